"""The layouts of three and four ranks: the full table, which is too slow for `make test`."""

from __future__ import annotations

from typing import Any

import pytest
from support.layouts import CASES, Results, assert_same

pytestmark = pytest.mark.slow

ENGINES = [f"tp2_dp2_zero{stage}{sequence}" for stage in (0, 1, 2, 3) for sequence in ("", "_sp")]


@pytest.fixture(scope="module")
def wide(spawn: Any) -> list[dict[str, Any]]:
    return spawn("layouts_wide", 4)


@pytest.fixture(scope="module")
def odd(spawn: Any) -> Results:
    return spawn("layouts_odd", 3)


@pytest.mark.parametrize("case", [case for case in CASES if case != "six_groups"])
@pytest.mark.parametrize("layout", ["tp4", "tp4_sp"])
def test_four_ranks_match_one(wide: list[dict[str, Any]], case: str, layout: str) -> None:
    assert_same([rank["layouts"] for rank in wide], case, layout)


@pytest.mark.parametrize("case", ["learned", "query_norm"])
def test_nine_heads_in_three_groups_match_one_rank(odd: Results, case: str) -> None:
    assert_same(odd, case, "tp3")


@pytest.mark.parametrize("layout", ENGINES)
def test_two_by_two_ranks_match_the_plain_loop(wide: list[dict[str, Any]], layout: str) -> None:
    ours, plain = wide[0]["engines"][layout], wide[0]["engines"]["plain"]
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5)
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-4)
