"""Captures and restores the random states of one rank: the CPU's, the GPU's and Megatron-core's named ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def capture() -> dict[str, Any]:
    """Return all random states of this rank, as tensors in dictionaries."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "tracker": _tracker().get_states()}


def restore(states: dict[str, Any]) -> None:
    """Set the random states that ``capture`` returned."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    _tracker().set_states(states["tracker"])


def write(file: Path, states: dict[str, Any]) -> None:
    """Write what ``capture`` returned."""
    with file.open("wb") as stream:  # torch.save does not say why it cannot open a file.
        torch.save(states, stream)


def restore_file(file: Path) -> None:
    """Set the random states that ``write`` wrote."""
    restore(torch.load(file, weights_only=True))
