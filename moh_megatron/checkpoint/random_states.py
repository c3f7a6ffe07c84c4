"""The random states in a checkpoint, one file a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moh_megatron.checkpoint.native import RANDOM_STATES
from moh_megatron.parallel import random_states


def _file(checkpoint: Path) -> Path:
    return checkpoint / RANDOM_STATES / f"rank_{dist.get_rank():05d}.pt"


def write(checkpoint: Path, states: dict[str, Any]) -> Path:
    """Save what ``parallel.random_states.capture`` gave on this rank; returns the file."""
    with open(_file(checkpoint), "wb") as file:  # given the path, torch would tell a missing folder without its errno
        torch.save(states, file)
    return _file(checkpoint)


def restore(checkpoint: Path) -> None:
    """Give this rank the random states it had when ``checkpoint`` was written, at the same topology."""
    random_states.restore(torch.load(_file(checkpoint), weights_only=True))
