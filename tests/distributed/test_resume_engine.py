"""An engine resumed from a checkpoint: equal bit for bit at the same topology, up to rounding at another one."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

FP32 = [(tensor, stage, "fp32") for tensor in (1, 2) for stage in (0, 1, 2, 3)]
OTHER_SETTINGS = [
    *(f"offload_zero{stage}{precision}" for precision in ("", "_bf16") for stage in (1, 2, 3)),
    *("bias", "sequence", "sequence_zero3_bf16", "grouped", "grouped_zero3_bf16"),
]
BF16 = [(tensor, stage, "bf16") for tensor in (1, 2) for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("resume", 2)


@pytest.mark.parametrize("case", [*FP32, *BF16], ids=lambda case: "tp{}_zero{}_{}".format(*case))
def test_same_topology_resumes_bit_for_bit(results: list[dict[str, Any]], case: tuple[int, int, str]) -> None:
    for rank in results:
        continued, resumed = rank["same"][case]
        assert resumed == continued


@pytest.mark.parametrize("case", OTHER_SETTINGS)
def test_other_settings_resume_bit_for_bit(results: list[dict[str, Any]], case: str) -> None:
    for rank in results:
        continued, resumed = rank["same"][case]
        assert resumed == continued


@pytest.mark.parametrize(
    ("case", "loss_tolerance", "norm_tolerance"),
    [("fp32", 1e-5, 1e-4), ("bf16", 1e-2, 2e-2), ("fp32_grouped", 1e-5, 1e-4)],
)
def test_other_topologies_resume_up_to_rounding(
    results: list[dict[str, Any]], case: str, loss_tolerance: float, norm_tolerance: float
) -> None:
    """TP 2 DP 1 -> TP 1 DP 2 and back through every ZeRO stage; each starts from the checkpoint of the one before."""
    curves = results[0]["chain"][case]
    assert len(curves["continued"]) == len(curves["changing"]) == 12
    for (loss, norm), (expected_loss, expected_norm) in zip(curves["changing"], curves["continued"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=loss_tolerance)
        assert norm == pytest.approx(expected_norm, rel=norm_tolerance)


@pytest.mark.parametrize("case", ["fp32", "bf16", "fp32_grouped"])
def test_resharding_changes_no_bit(results: list[dict[str, Any]], case: str) -> None:
    """Compare weights, Adam's moments, and the fp32 master weights of bf16 ones."""
    assert [rank["chain"][case]["changed"] for rank in results] == [[], []]


@pytest.mark.parametrize("way", ["sequence", "offload", "recompute", "deepspeed"])
def test_other_ways_to_compute_the_same_resume_up_to_rounding(results: list[dict[str, Any]], way: str) -> None:
    curves = results[0]["ways"]
    for (loss, norm), (expected_loss, expected_norm) in zip(curves[way], curves["continued"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_imported_llama_starts_with_the_loss_of_transformers(results: list[dict[str, Any]]) -> None:
    """The run has another TP and ZeRO stage than the checkpoint, and another padding of the vocabulary."""
    expected_loss, expected_norm = results[0]["imported"]["expected"]
    curves = results[0]["imported"]["ours"]
    assert len(curves) == 3
    for ((loss, norm),) in curves.values():
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_failed_write_of_one_rank_is_reported_on_all(results: list[dict[str, Any]]) -> None:
    assert results[0]["fault"] == results[1]["fault"]
    assert results[0]["fault"].startswith("the checkpoint of step 1 cannot be written to ")
    assert "No space left on device" in results[0]["fault"]
    assert results[0]["fault"].endswith("Newest complete checkpoint: none.")
