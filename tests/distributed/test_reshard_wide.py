"""One run resumed on two and four ranks in turn: TP 2, TP 1 x DP 2, TP 2 x DP 2, TP 4, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHAIN = [(2, [(2, 1), (1, 2)]), (4, [(2, 3), (1, 1), (4, 2)]), (2, [(2, 0), (1, 3), (2, 1)])]
"""World size -> (tensor parallelism, ZeRO stage), two steps at each."""


def test_loss_continues_at_other_parallelism(spawn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 2 * sum(len(layouts) for _, layouts in CHAIN)
    monkeypatch.setenv("RESHARD_FOLDER", str(tmp_path / "checkpoints"))
    curve: list[tuple[float, float]] = []
    uninterrupted: list[tuple[float, float]] = []
    for world_size, layouts in CHAIN:
        monkeypatch.setenv("RESHARD_LAYOUTS", json.dumps(layouts))
        monkeypatch.setenv("RESHARD_UNINTERRUPTED", str(0 if uninterrupted else steps))
        ranks = spawn("reshard", world_size)
        losses = [[loss for loss, _ in rank["curve"]] for rank in ranks]
        assert all(of_rank == pytest.approx(losses[0], rel=1e-6) for of_rank in losses)
        for rank in ranks:
            assert len(rank["same"]) == len(layouts)
            assert all(continued == resumed for continued, resumed in rank["same"]), (
                "at the same layout the run resumes bit for bit"
            )
        curve += ranks[0]["curve"]
        uninterrupted = uninterrupted or ranks[0]["uninterrupted"]
    assert len(curve) == len(uninterrupted) == steps
    for (loss, norm), (expected_loss, expected_norm) in zip(curve, uninterrupted, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
