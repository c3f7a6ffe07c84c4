"""One checkpoint over worlds of two and four ranks: TP 2, TP 1 x DP 2, TP 2 x DP 2, TP 4, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHAIN = [(2, [(2, 1), (1, 2)]), (4, [(2, 3), (1, 1), (4, 2)]), (2, [(2, 0), (1, 3), (2, 1)])]
"""World size -> (tensor parallelism, ZeRO stage), two steps at each."""


def test_the_loss_goes_on(spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 2 * sum(len(places) for _, places in CHAIN)
    monkeypatch.setenv("RESHARD_FOLDER", str(tmp_path / "checkpoints"))
    curve: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []
    for world_size, places in CHAIN:
        monkeypatch.setenv("RESHARD_PLACES", json.dumps(places))
        monkeypatch.setenv("RESHARD_WHOLE", str(0 if whole else steps))
        ranks = spawn("reshard", world_size)
        losses = [[loss for loss, _ in rank["curve"]] for rank in ranks]
        assert all(each == pytest.approx(losses[0], rel=1e-6) for each in losses)
        for rank in ranks:
            assert len(rank["same"]) == len(places)
            assert all(straight == resumed for straight, resumed in rank["same"]), "the same place goes on bit for bit"
        curve += ranks[0]["curve"]
        whole = whole or ranks[0]["whole"]
    assert len(curve) == len(whole) == steps
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, whole, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
