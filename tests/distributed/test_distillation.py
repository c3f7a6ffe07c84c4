"""Distillation compared with a plain loop, at every tensor-parallel layout of two ranks and every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

LAYOUTS = [f"{name}_zero{stage}" for name in ("tp1", "tp2", "tp2_sp") for stage in (0, 1, 2, 3)]
ADAM_TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("distillation", 2)


def test_divergence_of_sharded_logits_and_its_gradient_match_torch(results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank["sharded"]
        torch.testing.assert_close(found["value"], found["expected_value"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["gradient"], found["expected_gradient"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engine_matches_the_plain_loop(results: list[dict[str, Any]], layout: str) -> None:
    ours, plain = results[0][layout], results[0]["plain"]
    assert min(plain["divergences"]) > 0.1, "the teacher must differ"
    for name in ("losses", "divergences", "norms"):
        assert ours[name][0] == pytest.approx(plain[name][0], rel=1e-5), name
        assert ours[name] == pytest.approx(plain[name], rel=ADAM_TOLERANCE), name
        assert results[1][layout][name] == pytest.approx(ours[name], rel=1e-6), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_matches_the_plain_loop_approximately(results: list[dict[str, Any]], stage: int) -> None:
    ours, plain = results[0][f"tp2_zero{stage}_bf16"], results[0]["plain"]
    for name in ("losses", "divergences"):
        assert ours[name] == pytest.approx(plain[name], rel=BF16_TOLERANCE), name
