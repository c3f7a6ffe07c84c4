"""An engine made anew from a checkpoint: bit for bit at the same topology, to rounding at another one."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

FP32 = [(tensor, stage, "fp32") for tensor in (1, 2) for stage in (0, 1, 2, 3)]
WITH = [
    *(f"offload_zero{stage}{precision}" for precision in ("", "_bf16") for stage in (1, 2, 3)),
    *("bias", "sequence", "sequence_zero3_bf16"),
]
BF16 = [(tensor, stage, "bf16") for tensor in (1, 2) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("resume", 2)


@pytest.mark.parametrize("case", [*FP32, *BF16], ids=lambda case: "tp{}_zero{}_{}".format(*case))
def test_the_same_topology_goes_on_bit_for_bit(results: list[dict[str, Any]], case: tuple[int, int, str]) -> None:
    for rank in results:
        straight, resumed = rank["same"][case]
        assert resumed == straight


@pytest.mark.parametrize("case", WITH)
def test_what_else_the_same_topology_holds_goes_on_bit_for_bit(results: list[dict[str, Any]], case: str) -> None:
    for rank in results:
        straight, resumed = rank["same"][case]
        assert resumed == straight


@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "norm_tolerance"), [("fp32", 1e-5, 1e-4), ("bf16", 1e-2, 2e-2)]
)
def test_another_topology_goes_on_to_rounding(
    results: list[dict[str, Any]], precision: str, loss_tolerance: float, norm_tolerance: float
) -> None:
    """TP 2 DP 1 -> TP 1 DP 2 and back through every ZeRO stage; each place starts from what the one before it saved."""
    curves = results[0]["chain"][precision]
    assert len(curves["straight"]) == len(curves["changing"]) == 12
    for (loss, norm), (expected_loss, expected_norm) in zip(curves["changing"], curves["straight"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resharding_changes_no_bit(results: list[dict[str, Any]], precision: str) -> None:
    """Weights, Adam's moments, and the fp32 masters of weights in bf16."""
    assert [rank["chain"][precision]["lost"] for rank in results] == [[], []]


@pytest.mark.parametrize("way", ["sequence", "offload", "recompute", "deepspeed"])
def test_another_way_to_compute_the_same_goes_on_to_rounding(results: list[dict[str, Any]], way: str) -> None:
    curves = results[0]["ways"]
    for (loss, norm), (expected_loss, expected_norm) in zip(curves[way], curves["straight"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_an_imported_llama_starts_as_transformers_computes_it(results: list[dict[str, Any]]) -> None:
    """At another TP and ZeRO stage than it was written for, with a vocabulary that is padded there and not here."""
    expected_loss, expected_norm = results[0]["imported"]["expected"]
    curves = results[0]["imported"]["ours"]
    assert len(curves) == 3
    for ((loss, norm),) in curves.values():
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_all_ranks_hear_of_one_that_cannot_write(results: list[dict[str, Any]]) -> None:
    assert results[0]["fault"] == results[1]["fault"]
    assert results[0]["fault"].startswith("the checkpoint of step 1 cannot be written to ")
    assert "No space left on device" in results[0]["fault"]
    assert results[0]["fault"].endswith("Newest complete checkpoint: none.")
