"""What the start of a run was spent on."""

import subprocess
import sys

from moh_megatron.train.startup_clock import StartupClock


def test_a_launcher_that_has_ended_is_left_out_of_the_clock(monkeypatch):
    launcher = subprocess.Popen([sys.executable, "-c", ""])
    launcher.wait()
    monkeypatch.setenv("MOH_LAUNCHER_PID", str(launcher.pid))
    clock = StartupClock()
    clock.mark("groups")
    assert list(clock.seconds) == ["imports", "groups"]


def test_a_launcher_that_runs_is_the_first_part(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        monkeypatch.setenv("MOH_LAUNCHER_PID", str(launcher.pid))
        clock = StartupClock()
        launcher.communicate(b"\n")
    assert list(clock.seconds) == ["launcher", "imports"]
