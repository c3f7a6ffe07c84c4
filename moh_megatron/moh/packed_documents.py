"""Applies an attention function to a batch of packed documents. Legend: S sequence, B batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def attend_packed(attention: Callable[..., Tensor], cu_seqlens: Tensor | None, *inputs: Tensor) -> Tensor:
    """``attention`` of ``inputs`` [S, B, ...] -> [S, B, ...], within each document.

    Args:
        attention: takes the inputs as [B * S, 1, ...], with the batch rows concatenated, and ``cu_seqlens``.
        cu_seqlens: int32 [documents + 1] over all batch rows; a document lies within one row. With None, ``attention``
            gets the inputs unchanged.
    """
    if cu_seqlens is None:
        return attention(*inputs)
    length, batch = inputs[0].shape[:2]
    out = attention(*(x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in inputs), cu_seqlens=cu_seqlens)
    return out.unflatten(0, (batch, length)).squeeze(2).transpose(0, 1)
