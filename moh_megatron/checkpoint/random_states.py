"""The random states in a checkpoint, one file a rank."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from moh_megatron.checkpoint.native import RNG
from moh_megatron.parallel import random_states


def make_folder(checkpoint: Path) -> None:
    """Make a new checkpoint's folder for them, and its parents."""
    (checkpoint / RNG).mkdir(parents=True)


def _file(checkpoint: Path) -> Path:
    return checkpoint / RNG / f"rank_{dist.get_rank():05d}.pt"


def write(checkpoint: Path) -> None:
    """Save this rank's."""
    torch.save(random_states.capture(), _file(checkpoint))


def restore(checkpoint: Path) -> None:
    """Give this rank the random states it had when ``checkpoint`` was written."""
    random_states.restore(torch.load(_file(checkpoint), weights_only=True))
