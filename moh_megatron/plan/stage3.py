"""What ZeRO stage 3 has whole of the parameters it shares out, under DeepSpeed's ``zero_optimization`` settings."""

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
"""DeepSpeed's own."""


def _setting(settings: Mapping[str, Any], name: str) -> int:
    # DeepSpeed takes either name.
    return int(settings.get(f"stage3_{name}", settings.get(name, _DEFAULTS[name])))


def persistent_size(of: Iterable[Weight], settings: Mapping[str, Any]) -> int:
    """Elements of the small parameters that stay whole on every rank, beside their partitions."""
    largest = _setting(settings, "param_persistence_threshold")
    most = _setting(settings, "model_persistence_threshold")
    total = 0
    for each in of:
        if each.size <= largest and total + each.size <= most:
            total += each.size
    return total


def most_gathered(settings: Mapping[str, Any]) -> int:
    """Elements gathered at one time, at most."""
    return _setting(settings, "max_live_parameters")


def most_kept(settings: Mapping[str, Any]) -> int:
    """Elements that stay gathered from the forward to the backward pass, at most: between the two uses of a parameter
    lie those of all behind it, twice."""
    return min(most_gathered(settings), _setting(settings, "max_reuse_distance") // 2)
