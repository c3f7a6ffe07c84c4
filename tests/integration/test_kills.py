"""kill -9 at random moments, also in the middle of a save: no more than one save interval is ever repeated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import ENVIRONMENT, REPOSITORY

INTERVAL, BATCH = 4, 8 * 32
LONGEST = 420


def run_campaigns(prepared: tuple[Path, Path], folder: Path, campaigns: dict[str, dict[str, Any]]) -> dict[str, Any]:
    config, data = prepared
    shared = [
        f"data.dir={data}",
        f"checkpoint.interval={INTERVAL}",
        "checkpoint.keep_last=2",
        "train.eval_interval=0",
        "monitor.tensorboard=false",
        "train.timeout_seconds=20",  # how soon a rank that is left alone ends follows from it
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
        timeout=LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(result.read_text())


def check(outcome: dict[str, Any], waits: bool) -> None:
    """The curve is the undisturbed one; ``waits``: training stands still while a checkpoint is written."""
    assert outcome["killed"] == outcome["whole"]
    for death in outcome["deaths"]:
        lost, saving = death["step"] - death["complete"], death["in_flight"]
        if waits or saving is None:
            assert lost <= INTERVAL, death
        else:
            # What was trained behind the save in flight comes on top: it is never more than until the next save.
            assert saving - death["complete"] <= INTERVAL, death
            assert death["step"] - saving <= INTERVAL, death


def steps(count: int) -> str:
    return f"train.total_tokens={count * BATCH}"


def test_three_kills(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    campaign = {"overrides": [steps(30)], "ranks": 2, "kills": 3, "seed": 3}
    outcome = run_campaigns(prepared, tmp_path, {"two_ranks": campaign})["two_ranks"]
    check(outcome, waits=False)
    assert len(outcome["deaths"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(LONGEST + 60)
def test_killed_again_and_again(prepared: tuple[Path, Path], tmp_path: Path) -> None:
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
    deaths = [death for outcome in outcomes.values() for death in outcome["deaths"]]
    assert len(deaths) == 25
    assert sum(death["in_flight"] is not None for death in deaths) >= 5, deaths
