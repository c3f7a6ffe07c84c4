"""Counts how a layer's heads are used between two logging points, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moh_megatron.moh.routing import Routing


class HeadStatistics:
    """Head counts and the balance loss of one layer, summed over micro-batches.

    The sums are not module buffers: casting the model to bf16 would cast them, and bf16 cannot hold a token count.
    """

    def __init__(self, heads: int) -> None:
        self._heads = heads
        self._counts: Tensor | None = None
        self._balance: Tensor | None = None
        self._batches = 0

    def record(self, routing: Routing) -> None:
        """Add one micro-batch; ``active`` [S, B, N] covers the full sequence on every tensor-parallel rank."""
        counts = routing.active.flatten(0, -2).sum(0)
        balance = routing.balance_loss.detach().float()
        self._counts = counts if self._counts is None else self._counts + counts
        self._balance = balance if self._balance is None else self._balance + balance
        self._batches += 1

    def drain(self, device: torch.device) -> Tensor:
        """[N + 1] float64: tokens that used each head, then the mean balance loss; resets the sums."""
        counts = self._counts if self._counts is not None else torch.zeros(self._heads, device=device)
        balance = self._balance if self._balance is not None else torch.zeros((), device=device)
        drained = torch.cat([counts.double(), balance.double().reshape(1) / max(self._batches, 1)])
        self._counts, self._balance, self._batches = None, None, 0
        return drained
