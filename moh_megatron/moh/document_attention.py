"""Batches of packed documents for attention that takes its documents in one row.

Legend: S sequence, B batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def document_attention(attention: Callable[..., Tensor], cu_seqlens: Tensor | None, *inputs: Tensor) -> Tensor:
    """``attention`` of ``inputs`` [S, B, ...] -> [S, B, ...], kept inside each document.

    Args:
        attention: takes the inputs as [B * S, 1, ...], the batch rows one behind the other, and ``cu_seqlens``.
        cu_seqlens: int32 [documents + 1] over all rows; a document lies within one row. None: no documents, the
            inputs are handed over as they are.
    """
    if cu_seqlens is None:
        return attention(*inputs)
    length, batch = inputs[0].shape[:2]
    out = attention(*(x.transpose(0, 1).flatten(0, 1).unsqueeze(1) for x in inputs), cu_seqlens=cu_seqlens)
    return out.unflatten(0, (batch, length)).squeeze(2).transpose(0, 1)
