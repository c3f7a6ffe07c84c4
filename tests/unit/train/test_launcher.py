"""The launcher with ranks that are small scripts: exit codes, signals, a hung rank, no orphans, exit.json."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.train import launcher
from moh_megatron.train.launcher import launch_run, run_processes, worst_code

RANK = """
import os, signal, sys, time
from moh_megatron.train.fault_tolerance.signals import StopRequest, die_with
rank, out = int(os.environ["RANK"]), sys.argv[1]
def note(name, text=""):
    with open(f"{out}/{name}_{rank}.new", "w") as stream:
        stream.write(str(text))
    os.rename(f"{out}/{name}_{rank}.new", f"{out}/{name}_{rank}")
def wait_for_stop(stop, seconds=60):
    end = time.monotonic() + seconds
    while stop.reason is None and time.monotonic() < end:
        time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path):
    def script(body: str) -> str:
        path = tmp_path / "rank.py"
        path.write_text(RANK + textwrap.dedent(body))
        return str(path)

    return script


@pytest.fixture(autouse=True)
def own_handlers():
    """run_processes() is meant for a process of its own and leaves its handlers in place."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("codes", "worst"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 75], 75),
        ([2, 75], 2),
        ([2, 0], 2),
        ([2, 1], 1),
        ([75, 1], 1),
        ([0, -9], 1),
        ([2, -15], 1),
        ([0, 3], 1),
        ([75, 143], 1),
    ],
)
def test_worst_code(codes, worst):
    assert worst_code(codes) == worst
    assert worst_code(codes[::-1]) == worst


def test_exit_code_of_each_rank_is_returned(script, tmp_path):
    path = script(
        """
        code = int(sys.argv[2 + rank])
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
        """
    )
    assert run_processes([path, str(tmp_path), "0", "2", "75", "1", "-9"], 5) == {0: 0, 1: 2, 2: 75, 3: 1, 4: -9}


def test_environment_of_each_rank(script, tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MOH_LAUNCHER_PID"]
    path = script(
        f"""
        import json
        note("environment", json.dumps([os.environ[name] for name in {names!r}]))
        note("arguments", json.dumps(sys.argv[1:]))
        """
    )
    run_processes([path, str(tmp_path), "a b", "c=d"], 2)
    for rank in range(2):
        environment = json.loads((tmp_path / f"environment_{rank}").read_text())
        assert environment == [str(rank), str(rank), "2", "2", "127.0.0.1", str(os.getpid())]
        assert json.loads((tmp_path / f"arguments_{rank}").read_text()) == [str(tmp_path), "a b", "c=d"]


def test_no_log_folder_is_left_behind(script, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run_processes([script(""), str(tmp_path)], 1)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_handling_of_hangup_is_restored(script, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    run_processes([script(""), str(tmp_path)], 1)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_rank_that_hangs_after_its_peer_died_is_killed(script, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.3)
    path = script(
        """
        stop = StopRequest.install()
        if rank == 0:
            sys.exit(1)
        while True:
            time.sleep(1)
        """
    )
    assert run_processes([path, str(tmp_path)], 2) == {0: 1, 1: -9}


def test_a_rank_that_ends_within_the_grace_time_is_not_killed(script, tmp_path):
    path = script("time.sleep(0.5 * rank)\nsys.exit(2 if rank == 0 else 0)")
    assert run_processes([path, str(tmp_path)], 2) == {0: 2, 1: 0}


def test_a_peer_that_finished_or_saved_starts_no_grace_time(script, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_GRACE_SECONDS", 0.1)
    path = script("time.sleep(1.0 if rank == 2 else 0)\nsys.exit((0, 75, 0)[rank])")
    assert run_processes([path, str(tmp_path)], 3) == {0: 0, 1: 75, 2: 0}


def test_a_rank_that_runs_long_after_the_others_finished_is_killed(script, tmp_path):
    path = script("time.sleep(60 * rank)")
    assert run_processes([path, str(tmp_path)], 2, patience=0.5) == {0: 0, 1: -9}


SAVING = """
stop = StopRequest.install()
die_with(int(os.environ["MOH_LAUNCHER_PID"]))
note("pid", os.getpid())
wait_for_stop(stop)
time.sleep(0.3)
note("saved", stop.reason)
os._exit(75)
"""
LAUNCHER = (
    "import sys; from moh_megatron.train.launcher import run_processes, worst_code;"
    "sys.exit(worst_code(list(run_processes(sys.argv[1:], 2).values())))"
)


@pytest.fixture
def start_launcher():
    """start_launcher(script, folder): two ranks of a launcher in a process of its own."""
    started: list[subprocess.Popen] = []

    def start_launcher(*arguments: object) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", LAUNCHER, *map(str, arguments)]))
        return started[-1]

    yield start_launcher
    for process in started:
        process.kill()
        process.wait()


def both(tmp_path: Path, name: str) -> list[str] | None:
    files = [tmp_path / f"{name}_{rank}" for rank in range(2)]
    return [file.read_text() for file in files] if all(file.exists() for file in files) else None


def test_stop_signals_are_forwarded_and_the_launcher_waits_for_the_save(script, start_launcher, tmp_path):
    path = script(SAVING)
    # One launcher per signal, all at the same time: each imports torch.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    folders = [tmp_path / number.name for number in numbers]
    launchers = []
    for folder in folders:
        folder.mkdir()
        launchers.append(start_launcher(path, folder))
    for number, folder, process in zip(numbers, folders, launchers, strict=True):
        wait_for(lambda folder=folder: both(folder, "pid"), 60)
        process.send_signal(number)
    for number, folder, process in zip(numbers, folders, launchers, strict=True):
        assert process.wait(30) == 75
        assert both(folder, "saved") == [f"received {number.name}"] * 2


def test_a_killed_launcher_leaves_no_orphan_and_the_ranks_save(script, start_launcher, tmp_path):
    process = start_launcher(script(SAVING), tmp_path)
    wait_for(lambda: both(tmp_path, "pid"), 60)
    process.kill()
    process.wait()
    wait_for(lambda: both(tmp_path, "saved"))
    assert both(tmp_path, "saved") == ["received SIGTERM"] * 2
    pids = [int(pid) for pid in both(tmp_path, "pid") or []]
    wait_for(lambda: not any(running(pid) for pid in pids))


def test_a_signal_while_the_ranks_start_is_delivered_later(script, start_launcher, tmp_path):
    path = script(
        """
        note("started")
        while signal.SIGUSR1 not in signal.sigpending():
            time.sleep(0.01)
        note("reason", StopRequest.install().reason)
        os._exit(75)
        """
    )
    process = start_launcher(path, tmp_path)
    wait_for(lambda: both(tmp_path, "started") is not None, 60)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75
    assert both(tmp_path, "reason") == ["received SIGUSR1"] * 2


def test_a_signal_that_another_thread_receives_while_the_ranks_start_is_delivered_later(script, tmp_path, monkeypatch):
    """Signals are blocked in the main thread, not in threads of libraries."""
    over, start = threading.Event(), launcher.start_processes
    other = threading.Thread(target=over.wait)
    other.start()
    assert other.ident is not None
    ident = other.ident

    def started(**options):
        context = start(**options)
        signal.pthread_kill(ident, signal.SIGTERM)
        return context

    monkeypatch.setattr(launcher, "start_processes", started)
    try:
        assert run_processes([script(SAVING), str(tmp_path)], 2) == {0: 75, 1: 75}
    finally:
        over.set()
    assert both(tmp_path, "saved") == ["received SIGTERM"] * 2


def test_a_second_signal_kills_ranks_that_are_blocked_or_still_starting(script, start_launcher, tmp_path):
    path = script(
        """
        import ctypes, threading
        if rank == 0:  # in a collective; rank 1 has no handlers yet
            stop = StopRequest.install()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        note("pid", os.getpid())
        ctypes.CDLL(None).sleep(60)
        """
    )
    process = start_launcher(path, tmp_path)
    wait_for(lambda: both(tmp_path, "pid"), 60)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert time.monotonic() - started < 10
    assert all(not running(int(pid)) for pid in both(tmp_path, "pid") or [])


# --- launch_run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "preflight", lambda config, ranks: None)
    return tiny({"run.dir": str(tmp_path / "run")})


def exit_record(tmp_path):
    return json.loads((tmp_path / "run" / "exit.json").read_text())


def test_a_killed_rank_is_written_to_exit_json_with_the_last_step(config, script, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "run" / "exit.json").write_text('{"code": 0}')
    path = script(
        """
        note("pid", os.getpid())
        if rank == 1:
            os.kill(os.getpid(), 9)
        def alive(pid):
            try:
                return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
            except FileNotFoundError:
                return False
        while not os.path.exists(f"{out}/pid_1") or alive(open(f"{out}/pid_1").read()):
            time.sleep(0.01)
        sys.exit(1)
        """
    )
    assert launch_run([path, str(tmp_path)], config, 2) == 1
    reason = "rank 1 was ended by SIGKILL"  # The error that rank 0 then met is not the cause.
    assert exit_record(tmp_path) == {"code": 1, "reason": reason, "step": 2}
    (message,) = caplog.messages
    assert message.startswith(f"{reason}. The same command goes on from the newest checkpoint in")


def test_a_bus_error_is_explained(config, script, tmp_path, caplog):
    path = script("os.kill(os.getpid(), signal.SIGBUS)")
    assert launch_run([path, str(tmp_path)], config, 1) == 1
    (message,) = caplog.messages
    assert "rank 0 was ended by SIGBUS (a file of data.dir was cut short" in message


@pytest.mark.parametrize("code", [0, 2, 75, 1])
def test_exit_json_of_rank_zero_is_kept(config, script, tmp_path, code):
    (tmp_path / "run").mkdir()
    path = script(
        f"""
        from pathlib import Path
        from moh_megatron.monitor.records import write_exit
        if rank == 0:
            write_exit(Path(out) / "run", {code}, "written by rank 0", 7)
        sys.exit({code})
        """
    )
    assert launch_run([path, str(tmp_path)], config, 2) == code
    assert exit_record(tmp_path) == {"code": code, "reason": "written by rank 0", "step": 7}


def test_an_error_before_the_start_is_written_to_exit_json_and_nothing_starts(config, script, tmp_path, monkeypatch):
    def refuse(config, ranks):
        raise UserError(f"no good with {ranks} ranks")

    monkeypatch.setattr(launcher, "preflight", refuse)
    with pytest.raises(UserError, match="no good with 2 ranks"):
        launch_run([script("note('started')"), str(tmp_path)], config, 2)
    assert exit_record(tmp_path) == {"code": 2, "reason": "no good with 2 ranks", "step": None}
    assert not (tmp_path / "started_0").exists()


@pytest.mark.parametrize("ranks", [0, -3])
def test_a_number_of_ranks_below_one_is_refused(config, tmp_path, ranks):
    with pytest.raises(UserError, match=rf"^--nproc-per-node must be at least 1\. Got {ranks}\.$"):
        launch_run(["unused.py"], config, ranks)
    assert exit_record(tmp_path)["code"] == 2


def test_a_run_folder_that_cannot_be_written_does_not_hide_the_error(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--nproc-per-node"):
        launch_run(["unused.py"], tiny({"run.dir": str(tmp_path / "file" / "run")}), 0)
