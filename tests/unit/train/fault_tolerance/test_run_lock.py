"""The lock of a run folder: who holds it, who is refused, and who waits."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from moh_megatron.train.fault_tolerance import run_lock
from moh_megatron.train.fault_tolerance.run_lock import RunFolderInUse, RunLock

HOLDER = """
import sys, time
from pathlib import Path
from moh_megatron.train.fault_tolerance.run_lock import RunLock
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


def test_second_process_is_refused_with_the_name_of_the_holder(holder, tmp_path):
    message = (
        f"{tmp_path}/run: process {holder.pid} on {socket.gethostname()} trains in this folder. "
        "Wait for it, or set run.dir to another one."
    )
    with pytest.raises(RunFolderInUse, match=f"^{re.escape(message)}$"):
        RunLock(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_lock_of_a_dead_process_is_released(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait(30)
    RunLock(tmp_path / "run").release()
    RunLock(tmp_path / "run").release()


def test_lock_waits_for_a_holder_on_another_machine(holder, tmp_path, monkeypatch):
    """A file server keeps the locks of a machine that crashed for a while."""
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    (tmp_path / "run" / ".lock").write_text("elsewhere 77\n")
    threading.Timer(0.5, holder.kill).start()
    RunLock(tmp_path / "run").release()
    assert (tmp_path / "run" / ".lock").read_text().startswith(f"{socket.gethostname()} ")


def test_lock_times_out_and_names_a_holder_on_another_machine(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "_TIMEOUT_SECONDS", 0.5)
    (tmp_path / "run" / ".lock").write_text("elsewhere 77\n")
    started = time.monotonic()
    with pytest.raises(RunFolderInUse, match="process 77 on elsewhere trains in this folder"):
        RunLock(tmp_path / "run")
    assert time.monotonic() - started > 0.5


def test_file_system_without_locks_admits_every_process(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    RunLock(tmp_path / "run")
    RunLock(tmp_path / "run")
