"""kill -9 at random moments, also during a save: a run repeats at most one save interval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import ENVIRONMENT, REPOSITORY

INTERVAL, BATCH = 4, 8 * 32
TIMEOUT_SECONDS = 420


def run_campaigns(prepared: tuple[Path, Path], folder: Path, campaigns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config, data = prepared
    shared = [
        f"data.dir={data}",
        f"checkpoint.interval={INTERVAL}",
        "checkpoint.keep_last=2",
        "train.eval_interval=0",
        "monitor.tensorboard=false",
        "train.timeout_seconds=20",  # bounds how soon a rank that lost its peers ends
    ]
    specification, result = folder / "specification.json", folder / "result.json"
    for name, values in campaigns.items():
        (folder / name).mkdir()
        values |= {"file": str(config), "folder": str(folder / name), "overrides": [*shared, *values["overrides"]]}
    specification.write_text(json.dumps(campaigns), encoding="utf-8")
    script = REPOSITORY / "tests" / "support" / "kill_runs.py"
    done = subprocess.run(
        [sys.executable, script, specification, result],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def check(outcome: dict[str, Any], waits: bool) -> None:
    """Check that the curve is that of a run without kills; ``waits``: training waits while a checkpoint is written."""
    assert outcome["killed"] == outcome["uninterrupted"]
    for kill in outcome["kills"]:
        lost, saving = kill["step"] - kill["complete"], kill["in_flight"]
        if waits or saving is None:
            assert lost <= INTERVAL, kill
        else:
            # The steps trained during the save are lost, too: at most those until the next save.
            assert saving - kill["complete"] <= INTERVAL, kill
            assert kill["step"] - saving <= INTERVAL, kill


def steps(count: int) -> str:
    return f"train.total_tokens={count * BATCH}"


def test_run_killed_three_times_keeps_its_curve(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    campaign = {"overrides": [steps(30)], "ranks": 2, "kills": 3, "seed": 3}
    outcome = run_campaigns(prepared, tmp_path, {"two_ranks": campaign})["two_ranks"]
    check(outcome, waits=False)
    assert len(outcome["kills"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
def test_run_killed_many_times_keeps_its_curve(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    campaigns: dict[str, dict[str, Any]] = {
        "tensor_parallel": {"overrides": [steps(120)], "ranks": 2, "kills": 10, "seed": 20},
        "data_parallel": {
            "overrides": [steps(120), "parallel.tensor=1", "parallel.zero_stage=2", "checkpoint.async=false"],
            "ranks": 2,
            "kills": 5,
            "seed": 21,
        },
        "alone": {"overrides": [steps(120), "parallel.tensor=1"], "ranks": 1, "kills": 10, "seed": 22},
    }
    outcomes = run_campaigns(prepared, tmp_path, campaigns)
    for name, outcome in outcomes.items():
        check(outcome, waits=name == "data_parallel")
    kills = [kill for outcome in outcomes.values() for kill in outcome["kills"]]
    assert len(kills) == 25
    assert sum(kill["in_flight"] is not None for kill in kills) >= 5, kills
