"""Stop requests, in separate processes that import only the module."""

import signal
import subprocess
import sys
import time

import pytest

PRELUDE = """
import os, signal, sys, time
from moh_megatron.train.fault_tolerance import signals
def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
def say(*what):
    print(*what, flush=True)
"""


def start(code: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PRELUDE + code], stdout=subprocess.PIPE, text=True, **options)


def line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def finish(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=30)
    return process.returncode, out.strip()


def test_module_imports_nothing_heavy():
    code, out = finish(start("say(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"))
    assert (code, out) == (0, "[]")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stop_signal_becomes_the_reason_and_does_not_end_the_process(number):
    process = start(
        "stop = signals.StopRequest.install(); say(stop.reason); wait_for(lambda: stop.reason); say(stop.reason)"
    )
    assert line(process) == "None"
    process.send_signal(number)
    assert finish(process) == (0, f"received {number.name}")


def test_second_signal_at_once_belongs_to_the_same_request():
    process = start(
        "stop = signals.StopRequest.install(); say(); wait_for(lambda: stop.reason); say(); time.sleep(0.3);"
        "say(stop.reason)"
    )
    line(process)
    process.send_signal(signal.SIGUSR1)
    line(process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, "received SIGUSR1")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_second_request_ends_the_process_at_once(number, code):
    process = start(
        "signals._SAME_SIGNAL_SECONDS = 0.2; stop = signals.StopRequest.install(); say();"
        "wait_for(lambda: stop.reason); time.sleep(0.4); say()\n"
        "try: time.sleep(20)\nfinally: say('cleaned up')"
    )
    line(process)
    process.send_signal(signal.SIGUSR1)
    line(process)
    process.send_signal(number)
    assert finish(process) == (code, "")


def test_second_request_ends_a_process_whose_main_thread_is_blocked():
    # No signal interrupts this call, as inside a collective, so that Python's own handlers do not run.
    process = start(
        "import ctypes, threading\n"
        "signals._SAME_SIGNAL_SECONDS = 0.2; stop = signals.StopRequest.install(); inner, outer = os.pipe()\n"
        "def report(): wait_for(lambda: stop.reason); time.sleep(0.4); say(stop.reason)\n"
        "threading.Thread(target=report).start(); say()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)\n"
        "ctypes.CDLL(None).read(inner, ctypes.create_string_buffer(1), 1)"
    )
    line(process)
    process.send_signal(signal.SIGTERM)
    assert line(process) == "received SIGTERM"
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (143, "")


def test_time_limit_requests_a_stop_and_the_first_signal_after_it_does_not_kill():
    process = start(
        "signals._SAME_SIGNAL_SECONDS = 0.2; stop = signals.StopRequest.install(); stop.limit(None); stop.limit(60);"
        "say(stop.reason); time.sleep(0.4); stop.limit(0.3); say(stop.reason);"
        "wait_for(lambda: stop._second_signal.first); say(stop.reason)"
    )
    assert line(process) == "None"
    assert line(process) == "train.max_seconds (0.3) is over"
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (0, "train.max_seconds (0.3) is over")


def test_a_request_may_repeat_for_two_seconds():
    from moh_megatron.train.fault_tolerance import signals

    assert signals._SAME_SIGNAL_SECONDS == 2.0


def test_blocked_signals_are_delivered_when_handlers_are_installed():
    process = start(
        "say(); wait_for(lambda: signal.sigpending() >= {signal.SIGTERM, signal.SIGUSR1}); say('alive');"
        "stop = signals.StopRequest.install(); say(stop.reason)",
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1)),
    )
    line(process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    code, out = finish(process)
    alive, reason = out.splitlines()
    assert (code, alive) == (0, "alive")
    assert reason in ("received SIGTERM", "received SIGUSR1")


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str({parent})], start_new_session=True)
time.sleep({seconds})
"""
CHILD = (
    PRELUDE
    + """
stop = signals.StopRequest.install()
signals.die_with(int(sys.argv[1]))
say(os.getpid())
wait_for(lambda: stop.reason)
say(stop.reason)
"""
)


def test_death_of_the_parent_becomes_a_stop_request():
    code = "import os\n" + PARENT.format(parent="os.getpid()", seconds=60)
    parent = subprocess.Popen([sys.executable, "-c", code, CHILD], stdout=subprocess.PIPE, text=True)
    assert line(parent).isdigit()
    parent.kill()
    assert line(parent) == "received SIGTERM"
    parent.communicate(timeout=30)


def test_parent_that_is_already_dead_becomes_a_stop_request():
    started = time.monotonic()
    code = "import os\n" + PARENT.format(parent="os.getpid() + 2**23", seconds=0)
    parent = subprocess.Popen([sys.executable, "-c", code, CHILD], stdout=subprocess.PIPE, text=True)
    out, _ = parent.communicate(timeout=30)
    assert out.splitlines()[1] == "received SIGTERM"
    assert time.monotonic() - started < 15
