"""What a run says before anything slow is loaded, and what it keeps from the terminal."""

import logging
import os
import signal
import subprocess
import sys
from types import ModuleType

import pytest

from moh_megatron.commands import continue_tune, pretrain
from moh_megatron.io.console import chatter_hidden, set_level
from moh_megatron.train.fault_tolerance.signals import stopping_message


@pytest.mark.parametrize("start", [pretrain.run_as_launcher, continue_tune.run_as_launcher])
@pytest.mark.parametrize(("ranks", "words"), [(1, "1 process"), (2, "2 processes")])
def test_the_start_is_announced_before_the_launcher_is_imported(tiny, monkeypatch, caplog, start, ranks, words):
    caplog.set_level(logging.INFO, "moh_megatron")
    said_before = []

    class Launcher(ModuleType):
        def __getattr__(self, name):
            said_before.extend(caplog.messages)
            return lambda *arguments: 0

    monkeypatch.setitem(sys.modules, "moh_megatron.train.launcher", Launcher("launcher"))
    monkeypatch.setattr("signal.pthread_sigmask", lambda *arguments: None)
    assert start(tiny({}), ranks) == 0
    assert said_before[:1] == [f"starting {words}: loading PyTorch"]


def test_what_libraries_print_shows_under_verbose_alone(capsys):
    logger = logging.getLogger("moh_megatron")
    before = logger.level
    try:
        for level in (logging.INFO, logging.DEBUG):
            set_level(level)
            with chatter_hidden():
                print(f"memory at level {level}")
    finally:
        set_level(before)
    assert capsys.readouterr().out == f"memory at level {logging.DEBUG}\n"


RANK = """
from moh_megatron.io.console import console_logging
from moh_megatron.train.fault_tolerance.signals import StopRequest
with console_logging():
    stop = StopRequest.install()
    print("ready", flush=True)
    input()
"""


@pytest.mark.parametrize("launcher", [None, "77"])
def test_a_rank_answers_the_first_signal_at_once_unless_our_launcher_does(launcher):
    environment = {name: value for name, value in os.environ.items() if name != "MOH_LAUNCHER_PID"}
    environment |= {} if launcher is None else {"MOH_LAUNCHER_PID": launcher}
    command, pipe = [sys.executable, "-c", RANK], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as rank:
        assert rank.stdout
        assert rank.stderr
        assert rank.stdout.readline() == "ready\n"
        rank.send_signal(signal.SIGUSR1)
        answer = rank.stderr.readline() if launcher is None else ""
        _, rest = rank.communicate("\n")
    assert answer + rest == ("" if launcher else f"{stopping_message(signal.SIGUSR1)}\n")
