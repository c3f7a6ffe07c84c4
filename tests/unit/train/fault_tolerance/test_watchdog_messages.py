"""What the watchdog prints by itself, past logging: nothing in it is obeyed by a terminal."""

from __future__ import annotations

import os

import pytest

from moh_megatron.train.fault_tolerance.heartbeat import FailureReport
from moh_megatron.train.fault_tolerance.watchdog import Watchdog
from moh_megatron.train.fault_tolerance.world import World


def test_names_of_hosts_and_messages_of_other_ranks_are_shown_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    recorded = []
    watchdog = Watchdog(World(0, 1, 0), 60.0, lambda message, code: recorded.append((message, code)))
    message = "rank 0 (node\x1b[2J, after step 3, train) ended: /data/\x07\u202ex: no such file"
    with pytest.raises(SystemExit) as ended:
        watchdog._end(FailureReport(message, [], user_error=True))
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert "stack of rank 0's main thread:\n" in shown
    told = r"rank 0 (node\x1b[2J, after step 3, train) ended: /data/\x07\u202ex: no such file"
    assert shown.endswith(f"error: rank 0 ends, because {told}\n")
    assert recorded == [(message, 2)], "exit.json escapes by itself"
