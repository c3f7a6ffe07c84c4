"""The cases of the engine's table by world size: the layouts, and the variants of each."""

from __future__ import annotations

from typing import Any

from support.layouts import GROUPED

STEPS = 6
STAGES = (0, 1, 2, 3)

# There are two accumulation steps in every layout, so two replicas need twice the sequences.
_ONE_REPLICA, _TWO_REPLICAS = {"global_batch_size": 4}, {"global_batch_size": 8}
LAYOUTS: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {"tp1": {"parallel": {"tensor": 1}, "train": _ONE_REPLICA}},
    2: {
        "tp2": {"parallel": {"tensor": 2}, "train": _ONE_REPLICA},
        "tp2_sp": {"parallel": {"tensor": 2, "sequence": True}, "train": _ONE_REPLICA},
        "dp2": {"parallel": {"tensor": 1}, "train": _TWO_REPLICAS},
    },
    4: {
        "dp2_tp2": {"parallel": {"tensor": 2}, "train": _TWO_REPLICAS},
        "dp2_tp2_sp": {"parallel": {"tensor": 2, "sequence": True}, "train": _TWO_REPLICAS},
        "tp4": {"parallel": {"tensor": 4}, "train": _ONE_REPLICA},
        "tp4_sp": {"parallel": {"tensor": 4, "sequence": True}, "train": _ONE_REPLICA},
    },
}

_BF16 = {"train": {"precision": "bf16"}}
# SGD shows a wrong scale of the gradient, which Adam would not.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "adam": {},
    "sgd": {"optimizer": {"learning_rate": 0.3}},
    "bf16": _BF16,
    "sgd_bf16": {"optimizer": {"learning_rate": 0.3}, **_BF16},
    "offload": {"parallel": {"offload_optimizer": True}},
    "offload_bf16": {"parallel": {"offload_optimizer": True}, **_BF16},
    "full_recompute": {"train": {"recompute": "full"}},
    "selective_recompute": {"train": {"recompute": "selective"}},
    "tied": {"model": {"tie_word_embeddings": True}},
    "grouped": GROUPED,
}
REFERENCES = ("adam", "sgd", "tied", "grouped")
"""Variants with a plain loop, which the other variants are compared with, too."""
_IN_ALL_LAYOUTS = ("adam", "sgd", "bf16")
# Variants that hardly depend on the layout run in three: data parallelism, tensor parallelism, and both.
_IN_SOME_LAYOUTS = {
    "dp2": ("sgd_bf16", "offload", "offload_bf16", "tied", "grouped"),
    "tp2_sp": ("sgd_bf16", "full_recompute", "selective_recompute", "tied", "grouped"),
    "dp2_tp2": ("sgd_bf16", "offload", "full_recompute", "tied", "grouped"),
}
_HIGHEST_STAGE_ONLY = {"full_recompute", "selective_recompute", "tied"}
"""Variants that only stage 3, which acts in the forward pass, may change."""


def _exists(layout: str, stage: int, variant: str) -> bool:
    if stage == 0 and ("bf16" in variant or "offload" in variant):
        return False
    return stage == STAGES[-1] or variant not in _HIGHEST_STAGE_ONLY


CASES = [
    (size, layout, stage, variant)
    for size, layouts in LAYOUTS.items()
    for layout in layouts
    for stage in STAGES
    for variant in (*_IN_ALL_LAYOUTS, *_IN_SOME_LAYOUTS.get(layout, ()))
    if _exists(layout, stage, variant)
]


def sections(size: int, layout: str, stage: int, variant: str) -> dict[str, dict[str, Any]]:
    """Return the values that a case changes in the tiny configuration."""
    merged: dict[str, dict[str, Any]] = {"parallel": {"zero_stage": stage}}
    for part in (LAYOUTS[size][layout], VARIANTS[variant]):
        for section, values in part.items():
            merged[section] = merged.get(section, {}) | values
    return merged


def reference(layout: str, variant: str) -> tuple[bool, str]:
    """Return the plain loop that a case is compared with: whether its batch is the larger one, and its variant."""
    same = variant.removesuffix("_bf16")
    return layout.startswith("dp2"), same if same in REFERENCES else "adam"
