"""Packed documents: where each position's document starts."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[S] int64: the first position of the document each position belongs to; all 0 without documents."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.int64, device=device)
    starts = cu_seqlens[:-1].long()
    return starts.repeat_interleave(cu_seqlens.diff().long(), output_size=length)


def document_mask(cu_seqlens: Tensor, length: int) -> Tensor:
    """[S, S] bool: whether query i may see key j: not after it, and in the same document."""
    starts = document_starts(cu_seqlens, length, cu_seqlens.device)
    positions = torch.arange(length, device=cu_seqlens.device)
    return (positions <= positions[:, None]) & (positions >= starts[:, None])
