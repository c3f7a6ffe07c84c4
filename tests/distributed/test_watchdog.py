"""When a rank is lost, the others end in time and name it."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

# train.timeout_seconds is 8 in the worker.
DEADLINE_SECONDS = 20


@pytest.fixture(scope="module")
def results(spawn: Any) -> dict[str, dict[str, Any]]:
    return spawn("watched", 1)[0]


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("case", ["finished", "slow_start_save_and_end"])
def test_ranks_within_their_time_limits_finish(results: dict[str, dict[str, Any]], case: str) -> None:
    assert results[case]["codes"] == [0, 0, 0]
    assert [errors(log) for log in results[case]["logs"]] == [[], [], []]


@pytest.mark.parametrize(
    ("case", "codes", "missing", "reason"),
    [
        ("killed", [1, -9, 1], 1, "is missing: no heartbeat"),
        ("killed_first", [-9, 1, 1], 0, "is gone: the store"),
        ("stopped", [1, 1, None], 2, "is missing: no heartbeat for 8 s"),
        ("stopped_first", [None, 1, 1], 0, "has not answered for 8 s"),
        ("hung", [1, 1, 1], 1, "hangs in hang (workers/watched.py"),
        ("failed", [1, 1, 1], 1, "the disk of this rank is full"),
        ("failed_first", [1, 1, 1], 0, "the disk of this rank is full"),
        ("failed_at_start", [1, 1, 1], 2, "the disk of this rank is full"),
        ("hung_after_the_others_finished", [1, 1, 1], 1, "hangs in hang (workers/watched.py"),
        ("stopped_after_the_others_finished", [1, 1, None], 2, "is missing: no heartbeat for 8 s"),
        ("never_came", [1, -9, 1], 1, "did not come up within 8 s of the others"),
        ("first_never_came", [-9, 1, 1], 0, "did not come up within 8 s of rank"),
        ("user_error_of_one", [2, 2, 2], 1, "ended: no such architecture"),
    ],
)
def test_other_ranks_end_and_name_the_missing_rank(
    results: dict[str, dict[str, Any]], case: str, codes: list[int | None], missing: int, reason: str
) -> None:
    found = results[case]
    assert found["codes"] == codes
    if case != "failed_at_start":
        assert found["seconds"] < DEADLINE_SECONDS
    for rank in {0, 1, 2} - {missing}:
        (message,) = errors(found["logs"][rank])
        assert f"rank {missing} " in message
        assert reason in message


@pytest.mark.parametrize(
    ("case", "host"), [("launcher_stopped", "the launcher (process "), ("agent_stopped", "torchrun's agent ")]
)
def test_host_of_the_store_is_named(results: dict[str, dict[str, Any]], case: str, host: str) -> None:
    found = results[case]
    assert found["codes"] == [1, 1, 1]
    assert found["seconds"] < DEADLINE_SECONDS
    for log in found["logs"]:
        (message,) = errors(log)
        assert host in message
        assert "is missing: the store it hosts at 127.0.0.1:" in message
        assert "has not answered for 8 s" in message
    assert host in found["exit"]


def test_stop_request_is_obeyed_while_ranks_wait_for_another(results: dict[str, dict[str, Any]]) -> None:
    found = results["stop_requested_before_all_came_up"]
    assert found["codes"] == [75, -9, 75]
    assert found["seconds"] < 8
    assert [errors(log) for log in found["logs"]] == [[], [], []]


def test_user_error_of_all_ranks_is_reported_once(results: dict[str, dict[str, Any]]) -> None:
    found = results["user_error_of_all"]
    assert found["codes"] == [2, 2, 2]
    assert [errors(log) for log in found["logs"]] == [["error: no such architecture"], [], []]


@pytest.mark.parametrize("case", ["killed", "killed_first", "stopped", "stopped_first", "hung"])
def test_reason_is_written_without_the_missing_rank(results: dict[str, dict[str, Any]], case: str) -> None:
    assert "rank" in results[case]["exit"]
