"""The precision that small, sensitive arithmetic is done in."""

from __future__ import annotations

import torch


def at_least_fp32(inputs: torch.dtype) -> torch.dtype:
    """fp32 for anything narrower; float64 stays, so that a test can tell a wrong formula from rounding."""
    return torch.promote_types(inputs, torch.float32)
