"""Packed documents: where each position's document starts."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[S] int64: the first position of the document each position belongs to; all 0 without documents."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.int64, device=device)
    ends = cu_seqlens.to(device, torch.int64)
    return ends[:-1].repeat_interleave(ends.diff(), output_size=length)


def document_length(cu_seqlens: Tensor) -> int:
    """How long the document of a token is in the mean: sum of squared lengths over sum of lengths."""
    lengths = cu_seqlens.diff().double()
    return round(float(lengths.square().sum() / lengths.sum().clamp_min(1)))
