"""Weights that are no numbers, or not any more in another precision, are refused by name."""

from __future__ import annotations

from torch import Tensor

from moh_megatron.io.errors import UserError


def check_finite(tensor: Tensor, name: str, before: Tensor | None = None) -> None:
    """Raise UserError where ``tensor`` is not finite; ``before`` is what it was in another precision."""
    # NaN and infinity show in the extremes, which are found in one pass without a copy.
    if not tensor.is_floating_point() or not tensor.numel() or all(each.isfinite() for each in tensor.aminmax()):
        return
    narrowed = before is not None and bool(before.isfinite().all())
    cause = f"too large for {tensor.dtype}: choose another dtype" if narrowed else "broken weights"
    raise UserError(f"{name}: every value must be finite. Got inf or NaN ({cause}).")


def check_not_lost(tensor: Tensor, name: str, before: Tensor) -> None:
    """Raise UserError where all of ``tensor`` is 0 and ``before``, what it was in another precision, is not."""
    if before.any() and not tensor.any():
        raise UserError(
            f"{name}: its values, of at most {before.abs().max():.1g}, all become 0 in {tensor.dtype}: the router "
            "would rank no head above another. Choose bf16 or fp32."
        )
