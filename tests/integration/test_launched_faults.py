"""Ranks and launchers that are stopped, not killed: the other processes end and name the right one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from support.runs import TIMEOUT_SECONDS as LONGEST_SECONDS
from support.runs import Run, end, gone, ranks_of

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 8
DEADLINE_SECONDS = TIMEOUT_SECONDS + 20


@pytest.fixture
def started(new_run: Callable[[], Run]) -> Iterator[tuple[Run, int, list[int], Callable[[], tuple[int, str]]]]:
    """Start a run; return it, the process ids of launcher and ranks, and a function that waits for code and output."""
    run = new_run()
    process = run.start("train.total_tokens=2560000", f"train.timeout_seconds={TIMEOUT_SECONDS}")
    run.wait_for_step(6, process)

    def wait() -> tuple[int, str]:
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    ranks = ranks_of(process.pid)
    yield run, process.pid, ranks, wait
    for pid in [process.pid, *ranks]:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def test_stopped_rank_is_named_and_killed(started: tuple[Run, int, list[int], Callable[[], tuple[int, str]]]) -> None:
    run, _, ranks, wait = started
    os.kill(ranks[1], signal.SIGSTOP)
    started_at = time.monotonic()
    code, output = wait()
    assert code == 1
    assert time.monotonic() - started_at < DEADLINE_SECONDS
    assert "rank 1 (" in run.json("exit.json")["reason"]
    assert "is missing: no heartbeat for 8 s" in run.json("exit.json")["reason"]
    assert "whose message says why" not in output
    assert all(gone(rank) for rank in ranks)


def test_stopped_launcher_is_named_by_its_ranks(
    started: tuple[Run, int, list[int], Callable[[], tuple[int, str]]],
) -> None:
    run, launcher, ranks, wait = started
    os.kill(launcher, signal.SIGSTOP)
    started_at = time.monotonic()
    while not all(gone(rank) for rank in ranks):
        assert time.monotonic() - started_at < DEADLINE_SECONDS
        time.sleep(0.1)
    assert f"the launcher (process {launcher}) is missing" in run.json("exit.json")["reason"]
    os.kill(launcher, signal.SIGCONT)
    code, _ = wait()
    assert code == 1
    assert f"the launcher (process {launcher}) is missing" in run.json("exit.json")["reason"]


def test_no_step_is_recorded_after_that_of_exit_json_where_a_stopped_launcher_goes_on(
    started: tuple[Run, int, list[int], Callable[[], tuple[int, str]]],
) -> None:
    run, launcher, ranks, wait = started
    os.kill(launcher, signal.SIGSTOP)
    wait_for((run.folder / "exit.json").exists)
    os.kill(launcher, signal.SIGCONT)
    code, _ = wait()
    assert code == 1
    assert all(gone(rank) for rank in ranks)
    assert f"the launcher (process {launcher}) is missing" in run.json("exit.json")["reason"]
    assert run.json("exit.json")["step"] == run.records()[-1]["step"]


def test_launcher_that_goes_on_in_time_stops_its_run_as_usual(new_run: Callable[[], Run]) -> None:
    run = new_run()
    process = run.start("train.total_tokens=2560000", f"train.timeout_seconds={LONGEST_SECONDS}")
    run.wait_for_step(6, process)
    os.kill(process.pid, signal.SIGSTOP)
    run.wait_for_step(len(run.records()) + 6, process)  # The ranks train on.
    os.kill(process.pid, signal.SIGCONT)
    code, output = end(process, signal.SIGTERM)
    assert code == 75, output
    assert run.json("exit.json")["code"] == 75
    assert run.json("exit.json")["step"] == run.records()[-1]["step"]


def wait_for(condition: Callable[[], bool]) -> None:
    end_of_test = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert time.monotonic() < end_of_test
        time.sleep(0.01)
