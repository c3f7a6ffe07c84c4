"""Compares the results of tensor-parallel ranks with those of one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moh_megatron.checkpoint.mapping import merge_shards

TOLERANCE = 1e-5
GROUPED: dict[str, dict[str, Any]] = {
    "model": {"num_attention_heads": 16},
    "moh": {"shared_heads": 4, "shared_placement": "spread", "active_heads": 12, "routing_groups": "kv"},
}
"""Changes of the tiny configuration: in each of four KV groups of four heads, one is shared and two of three chosen."""
CASES = [
    "dense",
    "learned",
    "learned_paper",
    "one_shared_head",
    "no_shared_head",
    "query_norm",
    "contiguous",
    "gathered",
    "cpu",
    "cpu_query_norm",
    "six_groups",
    "spread",
    "lists",
    "lists_query_norm",
    "bias",
    "bias_query_norm",
    "straight_through_all",
    "frozen",
    "tied",
    "full_recompute",
    "selective_recompute",
    "documents",
    "documents_dense",
    "documents_dense_recompute",
    "documents_query_norm",
    "documents_cpu",
    "documents_full_recompute",
    "grouped",
    "grouped_dense",
    "grouped_cpu",
    "grouped_slots",
    "grouped_softmax",
    "grouped_lists",
    "grouped_bias",
    "grouped_query_norm",
    "grouped_query_norm_dense",
    "grouped_straight_through_all",
    "grouped_selective_recompute",
    "grouped_full_recompute",
    "grouped_documents",
    "grouped_documents_dense",
]
"""The cases of workers/layouts.py."""
DOUBLE = [
    "dense",
    "learned",
    "learned_paper",
    "query_norm",
    "spread",
    "lists",
    "lists_query_norm",
    "bias",
    "bias_query_norm",
    "gathered",
    "straight_through_all",
    "documents",
    "documents_query_norm",
    "full_recompute",
    "grouped",
    "grouped_softmax",
    "grouped_lists",
    "grouped_bias",
    "grouped_query_norm",
    "grouped_straight_through_all",
    "grouped_documents",
    "grouped_full_recompute",
]
"""The cases that also run in float64, which distinguishes a wrong formula from rounding."""

Results = list[dict[tuple[str, str], dict[str, Any]]]
"""For each rank: (case, layout) -> the result of ``gradients`` in workers/tiny.py."""


def shard_dim(name: str) -> tuple[int | None, int]:
    """Return dimension and stride along which tensor parallelism shards a parameter."""
    if "linear_qkv" in name or "embedding" in name or "output_layer" in name:
        return 0, 1
    if "linear_fc1" in name:
        return 0, 2
    return (1, 1) if "linear_proj" in name or "linear_fc2" in name else (None, 1)


def full_tensors(results: Results, case: str, layout: str, kind: str) -> dict[str, Tensor]:
    """Return one kind of tensor (weights, gradients) with the shards of all ranks merged."""
    shards = [rank[case, layout][kind] for rank in results]
    if layout == "tp1":
        return shards[0]
    return {name: merge_shards([shard[name] for shard in shards], *shard_dim(name)) for name in shards[0]}


def difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def assert_same(results: Results, case: str, layout: str, tolerance: float = TOLERANCE) -> None:
    """Check that initial weights, routing, loss and all gradients are those of TP 1."""
    reference, found = results[0][case, "tp1"], results[0][case, layout]
    assert reference["margin"] > 1e-4, "choose a seed whose routing is not near a tie"
    weights, their_weights = (
        full_tensors(results, case, "tp1", "weights"),
        full_tensors(results, case, layout, "weights"),
    )
    for name, weight in weights.items():
        assert torch.equal(their_weights[name], weight), f"{name} is not initialised alike"
    for layer, (active, expected) in enumerate(zip(found["active"], reference["active"], strict=True)):
        assert torch.equal(active, expected), f"layer {layer} routes otherwise"
    assert difference(found["loss"], reference["loss"]) < tolerance
    expected_gradients = full_tensors(results, case, "tp1", "gradients")
    got = full_tensors(results, case, layout, "gradients")
    trained = {name for name in weights if case != "frozen" or ".router." not in name}
    assert got.keys() == expected_gradients.keys() == trained
    worst = {name: difference(got[name], gradient) for name, gradient in expected_gradients.items()}
    assert max(worst.values()) < tolerance, {name: value for name, value in worst.items() if value >= tolerance}
