"""Counts the parameters that ZeRO stage 3 holds unpartitioned, under DeepSpeed's ``zero_optimization`` settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moh_megatron.plan.parameters import Weight

_DEFAULTS = {
    "param_persistence_threshold": 100_000,
    "model_persistence_threshold": 2**63 - 1,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
}
"""DeepSpeed's defaults."""


def _setting(settings: Mapping[str, Any], name: str) -> int:
    # DeepSpeed accepts both names.
    return int(settings.get(f"stage3_{name}", settings.get(name, _DEFAULTS[name])))


def persistent_size(parameters: Iterable[Weight], settings: Mapping[str, Any]) -> int:
    """Elements of the small parameters that every rank holds in full besides its partition."""
    largest = _setting(settings, "param_persistence_threshold")
    most = _setting(settings, "model_persistence_threshold")
    total = 0
    for weight in parameters:
        if weight.size <= largest and total + weight.size <= most:
            total += weight.size
    return total


def most_gathered(settings: Mapping[str, Any]) -> int:
    """The largest number of elements gathered at one time."""
    return _setting(settings, "max_live_parameters")


def most_kept(settings: Mapping[str, Any]) -> int:
    """The largest number of elements that stay gathered from the forward to the backward pass.

    Between the two uses of a parameter, all parameters after it are used twice; hence the factor 2.
    """
    return min(most_gathered(settings), _setting(settings, "max_reuse_distance") // 2)
