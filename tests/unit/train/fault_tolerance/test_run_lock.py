"""One run in a folder: who holds its lock, who is refused, and who is waited for."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from moh_megatron.train.fault_tolerance import run_lock
from moh_megatron.train.fault_tolerance.run_lock import Occupied, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from moh_megatron.train.run_lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_refused_and_told_who_is_there(holder, tmp_path):
    message = (
        f"{tmp_path}/run: process {holder.pid} on {socket.gethostname()} trains in this folder. "
        "Wait for it, or set run.dir to another one."
    )
    with pytest.raises(Occupied, match=f"^{re.escape(message)}$"):
        RunLock(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_dead_hold_nothing(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait(30)
    RunLock(tmp_path / "run").release()
    RunLock(tmp_path / "run").release()


def test_a_holder_on_another_machine_is_waited_for(holder, tmp_path, monkeypatch):
    """A file server keeps the locks of a machine that crashed for a while."""
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    (tmp_path / "run" / ".lock").write_text("elsewhere 77\n")
    threading.Timer(0.5, holder.kill).start()
    RunLock(tmp_path / "run").release()
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"{socket.gethostname()} ")


def test_a_holder_on_another_machine_that_stays_is_named(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_PATIENCE_SECONDS", 0.5)
    (tmp_path / "run" / ".lock").write_text("elsewhere 77\n")
    started = time.monotonic()
    with pytest.raises(Occupied, match="process 77 on elsewhere trains in this folder"):
        RunLock(tmp_path / "run")
    assert time.monotonic() - started > 0.5


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    RunLock(tmp_path / "run")
    RunLock(tmp_path / "run")
