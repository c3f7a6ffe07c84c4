"""The precision of arithmetic that is sensitive to rounding."""

from __future__ import annotations

import torch


def at_least_fp32(inputs: torch.dtype) -> torch.dtype:
    """fp32 for narrower types; float64 stays float64, so that a test can tell a wrong formula from rounding."""
    return torch.promote_types(inputs, torch.float32)
