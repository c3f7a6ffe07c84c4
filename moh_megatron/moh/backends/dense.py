"""Dense attention: computes every head. ``masked_attention`` is the reference of the sparse backends.

Legend: S sequence, B batch, N query heads, G KV groups, H head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(
    q_SBNH: Tensor,
    k_SBGH: Tensor,
    v_SBGH: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Every head, by torch's fused kernel; N / G query heads share a KV group.

    q [S, B, N, H], k and v [S, B, G, H] -> [S, B, N, H]. ``scale`` defaults to 1 / sqrt(H). ``cu_seqlens``
    [documents + 1] keeps attention inside each document; the documents are computed one by one.
    """
    lengths = [] if cu_seqlens is None else [length for length in cu_seqlens.diff().tolist() if length]
    if len(lengths) > 1:
        documents = zip(*(x.split(lengths) for x in (q_SBNH, k_SBGH, v_SBGH)), strict=True)
        return torch.cat([causal_attention(*document, scale=scale) for document in documents])
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``causal_attention`` of every head, then zeros where ``active`` [S, B, N] is false; the same shapes."""
    return causal_attention(q, k, v, scale=scale, cu_seqlens=cu_seqlens) * active.unsqueeze(-1)
