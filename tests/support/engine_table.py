"""The cases of the engine's table, by world size: which layouts, and what is varied in each."""

from __future__ import annotations

from typing import Any

STEPS = 6
STAGES = (0, 1, 2, 3)

# Two accumulation steps everywhere, so twice the sequences where there are two replicas.
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
# SGD shows a gradient of the wrong size, which Adam would not.
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
}
REFERENCES = ("adam", "sgd", "tied")
"""Variants whose bare loops the others are held against, too."""
_EVERYWHERE = ("adam", "sgd", "bf16")
# What the layout hardly bears on: where it is shared out over data parallelism, and where over both.
_ELSEWHERE = {
    "dp2": ("sgd_bf16", "offload", "offload_bf16", "tied"),
    "tp2_sp": ("sgd_bf16", "full_recompute", "selective_recompute", "tied"),
    "dp2_tp2": ("sgd_bf16", "offload", "full_recompute", "tied"),
}
_HIGHEST_STAGE_ONLY = {"full_recompute", "selective_recompute", "tied"}
"""The other stages do nothing in the forward pass."""


def _exists(layout: str, stage: int, variant: str) -> bool:
    if stage == 0 and ("bf16" in variant or "offload" in variant):
        return False
    return stage == STAGES[-1] or variant not in _HIGHEST_STAGE_ONLY


CASES = [
    (size, layout, stage, variant)
    for size, layouts in LAYOUTS.items()
    for layout in layouts
    for stage in STAGES
    for variant in (*_EVERYWHERE, *_ELSEWHERE.get(layout, ()))
    if _exists(layout, stage, variant)
]


def sections(size: int, layout: str, stage: int, variant: str) -> dict[str, dict[str, Any]]:
    """What a case changes in the tiny configuration."""
    merged: dict[str, dict[str, Any]] = {"parallel": {"zero_stage": stage}}
    for part in (LAYOUTS[size][layout], VARIANTS[variant]):
        for section, values in part.items():
            merged[section] = merged.get(section, {}) | values
    return merged


def reference(layout: str, variant: str) -> tuple[bool, str]:
    """Which bare loop a case is held against: whether it has the larger batch, and its variant, in fp32."""
    same = variant.removesuffix("_bf16")
    return layout.startswith("dp2"), same if same in REFERENCES else "adam"
