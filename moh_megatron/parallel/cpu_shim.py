"""Replaces the CUDA calls of Megatron-core by CPU ones, on machines without CUDA.

Megatron-core allocates communication buffers on ``torch.cuda.current_device()`` and keeps its random states through
the CUDA generator, also on a machine without a GPU. No other calls need a replacement. ``groups.initialize`` calls
``install`` before Megatron-core is first used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as megatron_random


class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
    """Megatron-core's tracker of named random states, for the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        previous = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(previous)


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Install the replacements; does nothing where CUDA is available, or when called again."""
    if torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    megatron_random.CudaRNGStatesTracker = CpuRngStatesTracker  # type: ignore[misc]
    megatron_random._get_cuda_rng_state = _get_rng_state  # type: ignore[assignment]
    megatron_random._set_cuda_rng_state = _set_rng_state  # type: ignore[assignment]
