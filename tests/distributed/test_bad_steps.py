"""A loss or gradient that is not finite on one rank: all ranks skip the step, and no bit changes."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytestmark = pytest.mark.slow
LAYOUTS = (
    *("dp2_zero0", "dp2_zero1", "dp2_zero2", "dp2_zero3", "tp2_zero0", "tp2_zero1", "tp2_zero2", "tp2_zero3"),
    *("dp2_zero1_bf16", "dp2_zero2_bf16", "dp2_zero3_bf16"),
    *("dp2_zero1_offload", "dp2_zero2_offload", "dp2_zero3_offload"),
    *("dp2_zero1_offload_bf16", "dp2_zero2_offload_bf16", "dp2_zero3_offload_bf16"),
)
KINDS = ("nan_loss", "constant_inf_loss", "nan_gradient", "inf_gradient_early")


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("bad_steps", 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_step_changes_nothing_on_any_rank(results: list[dict[str, Any]], layout: str, kind: str) -> None:
    for rank in results:
        found = rank[f"{layout}-{kind}"]
        assert not math.isfinite(found["norm"])
        assert not found["applied"]
        assert found["unchanged"]
        assert found["applied_afterwards"]
        assert found["same_without"], "later steps equal those of a run without the bad one"
