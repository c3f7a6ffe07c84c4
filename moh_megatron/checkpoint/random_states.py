"""The random states in a checkpoint, one file a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moh_megatron.parallel import rng

FOLDER = "rng"


def _file(checkpoint: Path) -> Path:
    return checkpoint / FOLDER / f"rank_{dist.get_rank():05d}.pt"


def write(checkpoint: Path, states: dict[str, Any]) -> Path:
    """Save what ``parallel.rng.capture`` gave on this rank; returns the file."""
    with _file(checkpoint).open("wb") as stream:  # torch's own way to open a file hides why it cannot
        torch.save(states, stream)
    return _file(checkpoint)


def restore(checkpoint: Path) -> None:
    """Give this rank the random states it had when ``checkpoint`` was written, at the same topology."""
    rng.restore(torch.load(_file(checkpoint), weights_only=True))
