"""Connects to the store in which the ranks of a run meet, and puts the job's token in front of every key.

torch.distributed would connect by itself, and its keys would be the same in every job: a process that reaches the
store could answer in place of a rank.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from moh_megatron.train.fault_tolerance.world import TOKEN_VARIABLE, World


def hosted_by_launcher() -> bool:
    """Return whether our launcher or torchrun's agent hosts the store of the ranks; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def with_token(part: str, store: Store) -> Store:
    """Return ``store`` for the ``part`` of the program that alone uses its keys; each begins with the job's token."""
    return PrefixStore(f"{os.environ.get(TOKEN_VARIABLE, '')}_{part}", store)


def connect(world: World, timeout: timedelta) -> TCPStore:
    """Connect this rank to the run's store, which comes up within ``timeout``. Raises DistError where it does not.

    Each call makes a connection of its own: a call that waits blocks the connection for all others.
    """
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=world.rank == 0 and not hosted_by_launcher(),
        timeout=timeout,
        # To wait for the other ranks, torch would use a key without the token.
        wait_for_workers=False,
        multi_tenant=True,
    )


def torch_store(world: World, timeout: timedelta) -> Store:
    """Return the store for torch.distributed's own keys, in which process groups find their ranks."""
    return HashStore() if world.size == 1 else with_token("torch", connect(world, timeout))
