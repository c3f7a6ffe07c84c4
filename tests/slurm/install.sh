#!/usr/bin/env bash
# Debian's Slurm, for `make test-slurm`. What is installed already is left as it is, and nothing is started.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

if [ "$(id -u)" != 0 ]; then
    echo "error: the tests of slurm/ start a Slurm of their own in namespaces, which needs root: sudo make test-slurm" >&2
    exit 2
fi
missing=()
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge ip:iproute2 unshare:util-linux; do
    command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "error: missing: ${missing[*]} (Debian's names). Install them with this system's package manager." >&2
    exit 2
fi
# The packages would start daemons; 101 forbids it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
