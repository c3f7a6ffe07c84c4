"""The same mask, loss and gradients at every tensor-parallel layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layouts import CASES, DOUBLE, TOLERANCE, Results, assert_same, difference, full_tensors, shard_dim

ACCUMULATION = ["accumulation", "task_accumulation"]


@pytest.fixture(scope="module")
def results(spawn: Any) -> Results:
    ranks = spawn("layouts", 2)
    doubles, accumulation = (
        {f"{case}_float64" for case in DOUBLE},
        {f"{name}_{n}" for name in ACCUMULATION for n in (1, 4)},
    )
    assert {case for case, _ in ranks[0]} == {*CASES, *doubles, *accumulation, "replicas"}
    return ranks


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_layout_changes_nothing_beyond_rounding(results: Results, case: str, layout: str) -> None:
    assert_same(results, case, layout)


@pytest.mark.parametrize("case", DOUBLE)
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_layout_changes_only_the_last_digits_of_float64(results: Results, case: str, layout: str) -> None:
    assert_same(results, f"{case}_float64", layout, 1e-9)


@pytest.mark.parametrize("name", ACCUMULATION)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_accumulation_is_the_same_at_every_layout(results: Results, name: str, steps: int, layout: str) -> None:
    case = f"{name}_{steps}"
    assert difference(results[0][case, layout]["loss"], results[0][case, "tp1"]["loss"]) < TOLERANCE
    expected, got = full_tensors(results, case, "tp1", "gradients"), full_tensors(results, case, layout, "gradients")
    for parameter, gradient in expected.items():
        assert difference(got[parameter], gradient) < TOLERANCE, parameter
    statistics = zip(results[0][case, layout]["statistics"], results[0][case, "tp1"]["statistics"], strict=True)
    assert all(difference(found, reference) < TOLERANCE for found, reference in statistics)


def test_biases_follow_the_load_of_all_replicas(results: Results) -> None:
    # The tokens of each replica used one routed head; with one replica alone, the biases of all other heads rise.
    for rank in results:
        for biases in rank["replicas", "tp1"]["biases"]:
            assert biases.tolist() == [-1, -1, 1, 1, 1, 1]
        alone = [-1, 1, 1, 1, 1, 1] if rank is results[0] else [1, -1, 1, 1, 1, 1]
        assert all(biases.tolist() == alone for biases in rank["replicas", "tp2"]["biases"])


def test_straight_through_of_all_heads_has_another_gradient(results: Results) -> None:
    chosen, all_heads = results[0]["query_norm", "tp1"], results[0]["straight_through_all", "tp1"]
    assert torch.equal(chosen["active"][0], all_heads["active"][0])
    assert difference(all_heads["loss"], chosen["loss"]) < TOLERANCE
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert difference(all_heads["gradients"][name], chosen["gradients"][name]) > 1e-3


def test_four_micro_batches_have_the_gradient_of_one(results: Results) -> None:
    # Without the balance loss, which is computed for each micro-batch.
    one, four = (results[0][f"task_accumulation_{steps}", "tp1"] for steps in (1, 4))
    assert difference(four["loss"], one["loss"]) < TOLERANCE
    for name, gradient in one["gradients"].items():
        assert difference(four["gradients"][name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("grouped")])
def test_every_token_uses_the_same_number_of_heads_in_each_group(results: Results, case: str) -> None:
    for number, active in enumerate(results[0][case, "tp1"]["active"]):
        counts = active.unflatten(-1, (4, 4)).sum(-1)
        assert (counts == (2 if case == "grouped_lists" and number == 0 else 3)).all()


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp"])
def test_replicated_gradients_agree_on_all_ranks(results: Results, layout: str) -> None:
    for case in CASES:
        first, second = (rank[case, layout]["gradients"] for rank in results)
        for name, gradient in first.items():
            if shard_dim(name)[0] is None:
                assert difference(second[name], gradient) < TOLERANCE, (case, name)


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("full_recompute", "learned"),
        ("selective_recompute", "learned"),
        ("documents_full_recompute", "documents"),
        ("documents_dense_recompute", "documents_dense"),
        ("grouped_selective_recompute", "grouped"),
        ("grouped_full_recompute", "grouped"),
        ("grouped_slots", "grouped"),
    ],
)
def test_recomputation_and_the_name_of_the_backend_change_nothing(results: Results, case: str, reference: str) -> None:
    plain, recomputed = results[0][reference, "tp1"], results[0][case, "tp1"]
    assert torch.equal(plain["loss"], recomputed["loss"])
    for name, gradient in plain["gradients"].items():
        assert torch.equal(recomputed["gradients"][name], gradient), name


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("gathered", "learned"),
        ("cpu", "learned"),
        ("cpu_query_norm", "query_norm"),
        ("documents_cpu", "documents"),
        ("grouped", "grouped_dense"),
        ("grouped_cpu", "grouped_dense"),
        ("grouped_query_norm", "grouped_query_norm_dense"),
        ("grouped_documents", "grouped_documents_dense"),
    ],
)
def test_backends_agree_with_dense(results: Results, case: str, reference: str) -> None:
    dense, sparse = results[0][reference, "tp1"], results[0][case, "tp1"]
    assert difference(sparse["loss"], dense["loss"]) < TOLERANCE
    for name, gradient in dense["gradients"].items():
        assert difference(sparse["gradients"][name], gradient) < TOLERANCE, name


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2_sp"])
@pytest.mark.parametrize("case", ["learned", "full_recompute", "selective_recompute"])
def test_head_statistics_count_each_token_once(results: Results, case: str, layout: str) -> None:
    result = results[0][case, layout]
    for statistics, active in zip(result["statistics"], result["active"], strict=True):
        assert torch.equal(statistics[:-1], active.flatten(0, 1).sum(0).double())
    reference = results[0]["learned", "tp1"]["statistics"]
    for statistics, expected in zip(result["statistics"], reference, strict=True):
        assert difference(statistics, expected) < TOLERANCE
