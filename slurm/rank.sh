#!/usr/bin/env bash
# One rank's environment, then the command given: `srun bash slurm/rank.sh COMMAND...`. Runs on its node, in the container
# where there is one.
set -euo pipefail

# A node has several networks (management, storage, InfiniBand over IP), and NCCL and gloo would take the first or the one
# the host name resolves to, which other nodes may not reach. Take the one on which this node reaches the first.
interface_to() {
    local address route
    address=$(getent ahostsv4 "$1" | awk '{ print $1; exit }')
    [ -n "$address" ] || return 0
    # On the first node itself the way leads over lo; the others come in by the interface that carries the address.
    route=$(ip -o -4 address show to "$address/32" | awk '{ print $2; exit }')
    [ -n "$route" ] || route=$(ip -o -4 route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
    echo "$route"
}

if command -v ip >/dev/null; then
    interface=$(interface_to "$MASTER_ADDR")
    if [ -n "$interface" ]; then
        # NCCL: of its sockets, which carry the meeting, and the data where there is no InfiniBand. `=`: this name exactly.
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
        # gloo: the agreement on signals, and all data on CPU nodes.
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    fi
fi
exec "$@"
