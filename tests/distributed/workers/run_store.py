"""Two ranks meet in a store that a launcher hosts, and in one of rank 0, and list every key in it."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from moh_megatron.parallel import groups
from moh_megatron.train.engine import initialize_distributed
from moh_megatron.train.fault_tolerance.watchdog import Watchdog
from moh_megatron.train.fault_tolerance.world import TOKEN_VARIABLE, World

SECONDS = 120.0
TOKEN = "0123456789abcdef"


def keys_of_a_run(world: World) -> tuple[list[str], float]:
    """The keys of the store after every kind of group has been used, and a sum over the ranks."""
    watchdog = Watchdog(world, SECONDS, lambda message, code: None)
    with watchdog.watching():
        assert watchdog.all_ranks_up(lambda: False)
        initialize_distributed(world, timedelta(seconds=SECONDS))
        groups.initialize(2, seed=1)
        control = groups.control_group()
        total = torch.ones(1)
        for group in (None, control, groups.tp_group(), groups.dp_group()):
            dist.all_reduce(total, group=group)
        dist.monitored_barrier(control)
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
        keys = store.list_keys()
        dist.barrier()
        groups.destroy()
    return keys, total.item()


def main(result: Path) -> None:
    world = World(int(os.environ["RANK"]), 2, int(os.environ["RANK"]))
    os.environ[TOKEN_VARIABLE] = TOKEN
    launcher = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
    found = {"launcher": keys_of_a_run(world)}

    # As srun starts ranks. The port is held from here on, and the server that holds it is the one that the run finds.
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    if world.rank == 0:
        server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        launcher.set("port of rank 0", str(server.port))
    os.environ["MASTER_PORT"] = launcher.get("port of rank 0").decode()
    found["rank 0"] = keys_of_a_run(world)
    launcher.set(f"finished {world.rank}", "")
    launcher.wait(["finished 0", "finished 1"])
    torch.save(found, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
