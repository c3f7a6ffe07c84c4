"""Computes the active heads by a stock attention kernel, where every token uses equally many heads in each KV group.

The k active heads of a group read the same keys and values. Gathered into k slots they are k ordinary query heads, and
any causal kernel for grouped-query attention computes them and nothing else. Shapes do not depend on the choice, so
nothing waits for the device.

Legend: S sequence, B batch, N query heads, G KV groups, k slots in a group, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moh_megatron.moh.backends.dense import causal_attention, masked_attention


class _TakeRows(torch.autograd.Function):
    """Rows of a matrix by distinct indices. Keeps the indices alone, and is deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _PutRows.apply(gradients[0], index, ctx.count), None  # type: ignore[return-value]


class _PutRows(torch.autograd.Function):
    """The adjoint of ``_TakeRows``: a matrix of ``count`` rows, zero but for the given ones."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _TakeRows.apply(gradients[0], index), None, None  # type: ignore[return-value]


class Slots:
    """The k slots of each KV group: which of a token's heads they hold, in rising order.

    Args:
        active: bool [S, B, N], k heads of each group true; not checked.
        groups: G.
        slots: k.
    """

    def __init__(self, active: Tensor, groups: int, slots: int) -> None:
        self.shape, self.heads = active.shape, groups * slots
        width = active.shape[-1] // groups
        chosen = active.unflatten(-1, (groups, width)).to(torch.uint8)
        head = chosen.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
        first_head = torch.arange(0, chosen[..., 0].numel() * width, width, device=active.device)
        self.index = (head + first_head.view(*head.shape[:-1], 1)).flatten()
        """[S * B * G * k] the flat index in [S, B, N] of each slot's head."""

    def take(self, values: Tensor) -> Tensor:
        """[S, B, N, ...] -> [S, B, G * k, ...]."""
        rows: Any = _TakeRows.apply(values.flatten(0, 2), self.index)
        return rows.view(*self.shape[:2], self.heads, *values.shape[3:])

    def put(self, values: Tensor) -> Tensor:
        """[S, B, G * k, ...] -> [S, B, N, ...], zero where no slot is."""
        rows: Any = _PutRows.apply(values.flatten(0, 2), self.index, self.shape.numel())
        return rows.view(*self.shape, *values.shape[3:])


def slots_in_each_group(active: Tensor, groups: int) -> int | None:
    """k if every token of ``active`` [S, B, N] uses k heads in each of the groups; None if the numbers differ.

    Waits for the device.
    """
    counts = active.unflatten(-1, (groups, -1)).sum(-1)
    if not counts.numel():
        return 0
    least, most = counts.aminmax()
    return int(least) if least == most else None


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    slots: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``sparse_attention`` of ``slots`` active heads in each KV group; not checked."""
    if not slots:  # No kernel takes no heads, and a zero of its own would have no gradient.
        return masked_attention(q, k, v, active, scale=scale, cu_seqlens=cu_seqlens)
    held = Slots(active, k.shape[2], slots)
    return held.put(causal_attention(held.take(q), k, v, scale=scale, cu_seqlens=cu_seqlens))
