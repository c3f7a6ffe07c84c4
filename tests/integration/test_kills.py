"""kill -9 at random moments, also in the middle of a save: nothing more than one save interval is ever repeated."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
from support.runs import Run, ranks_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLS = 6
INTERVAL = 3


def _kill_after(run: Run, step: int, during_save: bool, victim: int) -> None:
    """Start the run, wait for a step (or for the save after it to begin), and kill one rank."""
    process = run.start(f"checkpoint.interval={INTERVAL}")
    ranks = []
    while process.poll() is None:
        ranks = ranks or (ranks_of(process.pid) if run.records() else [])
        reached = bool(run.records()) and run.records()[-1]["step"] >= step
        saving = any((run.folder / "checkpoints").glob(".partial_*"))
        if reached and ranks and (saving or not during_save):
            os.kill(ranks[victim], signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate(timeout=120)


def test_killed_again_and_again(uninterrupted: Run, new_run: Callable[[], Run]) -> None:
    run, draw = new_run(), random.Random(20)
    done, saves = 0, 0
    for attempt in range(KILLS):
        step = min(done + draw.randint(1, 6), 28)
        during_save = attempt % 2 == 1
        _kill_after(run, step, during_save, victim=draw.randrange(2))
        saves += any((run.folder / "checkpoints").glob(".partial_*"))
        complete = sorted((run.folder / "checkpoints").glob("step_*"))
        done = int(complete[-1].name.removeprefix("step_")) if complete else 0
        assert run.records()[-1]["step"] - done <= INTERVAL
    assert saves > 0, "no kill fell into a save"
    last = run.finish(f"checkpoint.interval={INTERVAL}")
    assert last.returncode == 0, last.stdout + last.stderr
    keys = ("step", "loss", "grad_norm", "lr")
    expected = [[record[key] for key in keys] for record in uninterrupted.records()]
    assert [[record[key] for key in keys] for record in run.records()] == expected
