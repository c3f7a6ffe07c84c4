"""Promises 1 and 2 of the design: the same mask, loss and gradients at every tensor-parallel layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moh_megatron.checkpoint.mapping import merge_shards

CASES = [
    "dense",
    "learned",
    "learned_paper",
    "one_shared_head",
    "no_shared_head",
    "query_norm",
    "contiguous",
    "tied",
    "full_recompute",
    "selective_recompute",
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[tuple[str, str], dict[str, Any]]]:
    ranks = spawn("layouts", 2)
    assert {case for case, _ in ranks[0]} == set(CASES)
    return ranks


def _cut(name: str) -> tuple[int | None, int]:
    if "linear_qkv" in name or "embedding" in name or "output_layer" in name:
        return 0, 1
    if "linear_fc1" in name:
        return 0, 2
    return (1, 1) if "linear_proj" in name or "linear_fc2" in name else (None, 1)


def _whole(results: list[Any], case: str, layout: str, kind: str) -> dict[str, Tensor]:
    shards = [rank[case, layout][kind] for rank in results]
    if layout == "tp1":
        return shards[0]
    return {name: merge_shards([shard[name] for shard in shards], *_cut(name)) for name in shards[0]}


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_layout_changes_nothing(results: list[Any], case: str, layout: str) -> None:
    reference, here = results[0][case, "tp1"], results[0][case, layout]
    assert reference["margin"] > 1e-4, "choose a seed whose routing is not near a tie"
    weights, their_weights = _whole(results, case, "tp1", "weights"), _whole(results, case, layout, "weights")
    for name, weight in weights.items():
        assert torch.equal(their_weights[name], weight), f"{name} is not initialised alike"
    for layer, (active, expected) in enumerate(zip(here["active"], reference["active"], strict=True)):
        assert torch.equal(active, expected), f"layer {layer} routes otherwise"
    assert _difference(here["loss"], reference["loss"]) < TOLERANCE
    expected_gradients = _whole(results, case, "tp1", "gradients")
    got = _whole(results, case, layout, "gradients")
    assert got.keys() == expected_gradients.keys() == weights.keys()
    worst = {name: _difference(got[name], gradient) for name, gradient in expected_gradients.items()}
    assert max(worst.values()) < TOLERANCE, {name: value for name, value in worst.items() if value >= TOLERANCE}


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_replicated_gradients_agree_on_all_ranks(results: list[Any], layout: str) -> None:
    for case in CASES:
        first, second = (rank[case, layout]["gradients"] for rank in results)
        for name, gradient in first.items():
            if _cut(name)[0] is None:
                assert _difference(second[name], gradient) < TOLERANCE, (case, name)


@pytest.mark.parametrize("case", ["full_recompute", "selective_recompute"])
def test_recomputation_changes_nothing(results: list[Any], case: str) -> None:
    plain, recomputed = results[0]["learned", "tp1"], results[0][case, "tp1"]
    assert torch.equal(plain["loss"], recomputed["loss"])
    for name, gradient in plain["gradients"].items():
        assert torch.equal(recomputed["gradients"][name], gradient), name


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp"])
@pytest.mark.parametrize("case", ["learned", "full_recompute", "selective_recompute"])
def test_head_statistics_count_each_token_once(results: list[Any], case: str, layout: str) -> None:
    result = results[0][case, layout]
    for statistics, active in zip(result["statistics"], result["active"], strict=True):
        assert torch.equal(statistics[:-1], active.flatten(0, 1).sum(0).double())
    reference = results[0]["learned", "tp1"]["statistics"]
    for statistics, expected in zip(result["statistics"], reference, strict=True):
        assert _difference(statistics, expected) < TOLERANCE
