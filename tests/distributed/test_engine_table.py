"""The full table of the engine: every ZeRO stage at every layout matches the plain loop of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from support.engine_table import CASES, LAYOUTS, STAGES, VARIANTS, reference

pytestmark = pytest.mark.slow

TOLERANCES = {"sgd": 1e-5, "bf16": 1e-2, "sgd_bf16": 1e-2, "offload_bf16": 1e-2}
ADAM_TOLERANCE = 1e-4
FIRST_STEP_TOLERANCE = 1e-5
BF16_NORMS = BF16_WEIGHTS = 2e-2
LEARNED = 0.1
"""The least relative decrease of the reference's loss: a loss that hardly changes would match anything."""


@pytest.fixture(scope="module")
def table(spawn: Any) -> Any:
    """Return table: table(2) is what two ranks saved; they are spawned at its first call."""
    return cache(lambda size: spawn("engine_table", size))


def _id(case: tuple[int, str, int, str]) -> str:
    _, layout, stage, variant = case
    return f"{layout}-zero{stage}-{variant}"


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_engine_matches_the_plain_loop(table: Any, case: tuple[int, str, int, str]) -> None:
    size, layout, stage, variant = case
    results = table(size)[0]
    ours, plain = results[layout, stage, variant], results[reference(layout, variant)]
    tolerance = TOLERANCES.get(variant, ADAM_TOLERANCE)
    assert min(plain["norms"]) > 0.5, "clipping must be active, or a scale error hides behind Adam"
    assert ours["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    assert plain["losses"][-1] < (1 - LEARNED) * plain["losses"][0]
    if "bf16" in variant:
        assert ours["norms"] == pytest.approx(plain["norms"], rel=BF16_NORMS)
        assert max(ours["weight_errors"].values()) < BF16_WEIGHTS
    else:
        assert max(ours["weight_errors"].values()) < tolerance
        assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=FIRST_STEP_TOLERANCE)
        assert ours["norms"][0] == pytest.approx(plain["norms"][0], rel=FIRST_STEP_TOLERANCE)
        assert ours["norms"] == pytest.approx(plain["norms"], rel=tolerance)


@pytest.mark.parametrize("size", LAYOUTS)
def test_all_ranks_report_the_same(table: Any, size: int) -> None:
    for case in CASES:
        if case[0] == size:
            reports = [rank[case[1:]] for rank in table(size)]
            assert all(report["losses"] == reports[0]["losses"] for report in reports), case
            assert all(report["norms"] == pytest.approx(reports[0]["norms"], rel=1e-6) for report in reports), case


@pytest.mark.parametrize("layout", ["dp2", "dp2_tp2"])
def test_each_replica_holds_its_shard(table: Any, layout: str) -> None:
    size = next(size for size, layouts in LAYOUTS.items() if layout in layouts)
    for rank in table(size):
        for stage in STAGES:
            held = rank[layout, stage, "adam"]
            shards = 2 if stage else 1
            # Adam's two moments in fp32, and some padding.
            full_bytes = 2 * 4 * held["elements"]
            assert full_bytes / shards <= held["state_bytes"] <= 1.02 * full_bytes / shards
            assert held["resting_elements"] == (0 if stage == 3 else held["elements"])
            if layout == "dp2" and stage:
                assert rank[layout, stage, "offload"]["state_bytes"] == held["state_bytes"]


def test_every_variant_occurs_in_the_table() -> None:
    assert {variant for *_, variant in CASES} == set(VARIANTS)
