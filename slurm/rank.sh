#!/usr/bin/env bash
# Set the environment of one rank, then run its command: `srun bash slurm/rank.sh COMMAND...`. It runs on the node of the
# rank, outside the container if there is one.
set -euo pipefail

# A node may have several networks (management, storage, InfiniBand over IP). NCCL and gloo would take the first one or the
# one of the host name, which other nodes may not reach. Take the one on which this node reaches the first node.
interface_to() {
    local address route
    address=$(getent ahostsv4 "$1" | awk '{ print $1; exit }')
    [ -n "$address" ] || return 0
    # On the first node itself the route uses lo; the others reach it by the interface that has the address.
    route=$(ip -o -4 address show to "$address/32" | awk '{ print $2; exit }')
    [ -n "$route" ] || route=$(ip -o -4 route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
    echo "$route"
}

if command -v ip >/dev/null; then
    interface=$(interface_to "$MASTER_ADDR")
    if [ -n "$interface" ]; then
        # NCCL's sockets carry the rendezvous, and the data where there is no InfiniBand. `=` means exactly this name.
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$interface}
        # gloo carries the agreement on signals, and all data on CPU nodes.
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}
    fi
fi
exec "$@"
