"""The engine compared with a plain loop: losses, gradient norms under active clipping, optimizer shards."""

from __future__ import annotations

from typing import Any

import pytest

LAYOUTS = [f"{name}_zero{stage}" for name in ("tp1", "tp2", "tp2_sp") for stage in (0, 1, 2, 3)]
ADAM_TOLERANCE = 1e-4
BF16_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("engine", 2)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine_matches_the_plain_loop(results: list[dict[str, Any]], layout: str) -> None:
    ours, plain = results[0][layout], results[0]["plain"]
    assert min(plain["norms"]) > 0.5, "clipping must be active, or a scale error hides behind Adam"
    assert _relative(ours["losses"][0], plain["losses"][0]) < 1e-5
    assert _relative(ours["norms"][0], plain["norms"][0]) < 1e-5
    for step, (loss, expected) in enumerate(zip(ours["losses"], plain["losses"], strict=True)):
        assert _relative(loss, expected) < ADAM_TOLERANCE, step
    for step, (norm, expected) in enumerate(zip(ours["norms"], plain["norms"], strict=True)):
        assert _relative(norm, expected) < ADAM_TOLERANCE, step


def test_balance_loss_of_query_norm_is_in_the_gradient(results: list[dict[str, Any]]) -> None:
    ours, plain = results[0]["tp2_query_norm"], results[0]["plain_query_norm"]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=ADAM_TOLERANCE)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=ADAM_TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_matches_the_plain_loop_approximately(results: list[dict[str, Any]], stage: int) -> None:
    for loss, expected in zip(
        results[0][f"tp2_zero{stage}_bf16"]["losses"], results[0]["plain"]["losses"], strict=True
    ):
        assert _relative(loss, expected) < BF16_TOLERANCE


def test_all_ranks_report_the_same(results: list[dict[str, Any]]) -> None:
    for layout in LAYOUTS:
        assert results[0][layout]["losses"] == results[1][layout]["losses"]
        assert results[0][layout]["norms"] == pytest.approx(results[1][layout]["norms"], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_replicas_hold_half_the_optimizer_state_each(results: list[dict[str, Any]], stage: int) -> None:
    moments_and_padding = 1.02 * 2 * 4
    full_bytes = results[0]["tp1_zero0"]["state_bytes"]
    for rank in results:
        shard = rank[f"tp1_zero{stage}"]
        assert full_bytes >= 2 * 4 * shard["elements"]
        assert shard["state_bytes"] <= moments_and_padding * shard["elements"] / 2
        assert shard["state_bytes"] >= 2 * 4 * shard["elements"] / 2
