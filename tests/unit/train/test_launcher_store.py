"""The launcher's store, which only its ranks may speak to, and its answer to a signal; ranks are small scripts."""

import logging
import os
import signal
import textwrap
import threading
import time

import pytest

from moh_megatron.train.fault_tolerance.signals import STOP_SIGNALS, stopping_message
from moh_megatron.train.launcher import run_processes

RANK = """
import os, sys, time
from moh_megatron.train.fault_tolerance.signals import StopRequest
out = sys.argv[1]
def note(name, text=""):
    with open(f"{out}/{name}.new", "w") as stream:
        stream.write(str(text))
    os.rename(f"{out}/{name}.new", f"{out}/{name}_0")
def wait_for_stop(stop):
    while stop.reason is None:
        time.sleep(0.01)
"""


@pytest.fixture
def script(tmp_path):
    def script(body):
        (tmp_path / "rank.py").write_text(RANK + textwrap.dedent(body))
        return str(tmp_path / "rank.py")

    return script


@pytest.fixture(autouse=True)
def own_handlers():
    """run_processes() is meant for a process of its own and leaves its handlers in place."""
    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def test_the_store_listens_on_the_loopback_interface_alone_and_hears_messages_with_the_token_alone(script, tmp_path):
    body = """
        from moh_megatron.train.fault_tolerance.heartbeat import FailureReport, FailureReports
        from torch.distributed import TCPStore
        port = int(os.environ["MASTER_PORT"])
        sockets = [line.split()[1] for line in open("/proc/net/tcp") if line.split()[3] == "0A"]
        sockets += [line.split()[1] for line in open("/proc/net/tcp6") if line.split()[3] == "0A"]
        note("listens", [address for address in sockets if int(address.split(":")[1], 16) == port])
        store = TCPStore("127.0.0.1", port)
        ours = FailureReports(store)
        token = os.environ.pop("MOH_RUN_TOKEN")
        FailureReports(store).declare(FailureReport("a stranger ends the run.", []))
        note("stranger", ours.agreed())
        ours.declare(FailureReport("a rank ends the run.", []))
        note("own", ours.agreed().message)
        note("token", len(token))
    """
    assert run_processes([script(body), str(tmp_path)], 1) == {0: 0}
    assert (tmp_path / "listens_0").read_text().startswith("['0100007F:")
    assert (tmp_path / "listens_0").read_text().count(":") == 1
    assert (tmp_path / "stranger_0").read_text() == "None"
    assert (tmp_path / "own_0").read_text() == "a rank ends the run."
    assert (tmp_path / "token_0").read_text() == "32"


def test_the_launcher_answers_a_signal_at_once_and_once(script, tmp_path, caplog):
    caplog.set_level(logging.INFO, "moh_megatron")
    body = """
        stop = StopRequest.install()
        note("ready")
        wait_for_stop(stop)
        while not os.path.exists(f"{out}/go"): time.sleep(0.01)
        sys.exit(75)
    """
    answers = []

    def stop():
        wait_for((tmp_path / "ready_0").exists)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: caplog.messages)
        answers.extend(caplog.messages)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=stop)
    thread.start()
    assert run_processes([script(body), str(tmp_path)], 1) == {0: 75}
    thread.join()
    assert answers == [stopping_message(signal.SIGINT)]
    assert answers[0].startswith("received SIGINT: stopping after this step, saving.")
    assert caplog.messages == answers
