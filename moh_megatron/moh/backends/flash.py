"""Whether torch's fused attention runs its flash kernel: the others are several times slower on a GPU."""

from __future__ import annotations

import warnings

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention


def flash_refusal(
    *, length: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why causal attention of ``heads`` over ``groups`` cannot use the flash kernel on ``device``, None if it can."""
    q = torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)
    k = v = torch.empty(1, groups, length, head_dim, dtype=dtype, device=device)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, heads != groups), debug=True):
            return None
    return " ".join(str(reason.message) for reason in reasons) or "this build of torch has no flash attention"
