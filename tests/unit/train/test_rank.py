"""How a rank ends: its exit code and exit.json, with a stub in place of training."""

import errno
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.train.fault_tolerance.signals import StopRequest
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.rank import run_rank

LOADING = "loading Megatron-core and DeepSpeed\n"


class Exited(BaseException):
    """Raised in place of os._exit."""


@pytest.fixture
def end(tiny, tmp_path, monkeypatch):
    """end(outcome or exception, rank=0): run a rank whose training returns or raises that; its code and exit.json."""
    config = tiny({"run.dir": str(tmp_path / "run")})
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "exit.json"
    record.write_text('{"code": 75, "reason": "before the restart"}')
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.delenv("MOH_LAUNCHER_PID", raising=False)

    def exit_process(code):
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", exit_process)

    def end(result, rank=0):
        def train(config, world, stop):
            if isinstance(result, Exception):
                raise result
            return result

        loop, groups = ModuleType("loop"), ModuleType("groups")
        loop.train, groups.destroy = train, lambda: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "moh_megatron.train.loop", loop)
        monkeypatch.setitem(sys.modules, "moh_megatron.parallel.groups", groups)
        monkeypatch.setattr("moh_megatron.parallel.groups", groups, raising=False)
        try:
            code = run_rank(config, World(rank, 2, rank), StopRequest())
        except Exited as exited:
            code = exited.args[0]
        return code, json.loads(record.read_text()) if record.exists() else None

    return end


@pytest.mark.parametrize(("code", "reason"), [(0, "finished"), (75, "received SIGUSR1: saved")])
def test_outcome_of_training_is_written_and_returned(end, code, reason, capsys):
    assert end(SimpleNamespace(code=code, reason=reason, step=9)) == (code, {"code": code, "reason": reason, "step": 9})
    shown = capsys.readouterr().err
    assert shown.endswith("run: received SIGUSR1: saved. Last step: 9. The same command goes on.\n") == (code == 75)


def test_user_error_ends_with_code_2(end, capfd):
    assert end(UserError("not so")) == (2, {"code": 2, "reason": "not so", "step": 2})
    assert capfd.readouterr().err == f"{LOADING}error: not so\n"


def test_fault_ends_with_code_1(end, capfd):
    assert end(Fault("disk full")) == (1, {"code": 1, "reason": "disk full", "step": 2})
    assert capfd.readouterr().err == f"{LOADING}error: disk full\n"


def test_bug_shows_a_traceback(end, capfd):
    assert end(KeyError("what")) == (1, {"code": 1, "reason": "'what'", "step": 2})
    assert "in train" in capfd.readouterr().err


def test_only_the_first_rank_writes_exit_json(end):
    code, record = end(UserError("not so"), rank=1)
    assert code == 2
    assert record is not None
    assert record["reason"] == "before the restart"


LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")


def test_lost_peer_is_reported_without_a_traceback(end, capfd):
    reason = "rank 0 lost contact with another rank, whose message says why."
    assert end(LOST) == (1, {"code": 1, "reason": reason, "step": 2})
    assert capfd.readouterr().err == f"{LOADING}error: {reason}\n"


def test_lost_peer_is_left_to_our_launcher_to_report(end, monkeypatch):
    monkeypatch.setenv("MOH_LAUNCHER_PID", "1")
    code, record = end(LOST)
    assert code == 1
    assert record is not None
    assert record["reason"] == "before the restart"


def test_a_path_with_gloo_in_it_is_not_a_lost_peer(end, capfd):
    assert end(OSError(errno.ENOSPC, "No space left on device", "/data/igloo/x"))[0] == 1
    assert "/data/igloo/x: No space left on device" in capfd.readouterr().err


_COORDINATES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_RENDEZVOUS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def _environment(monkeypatch, values):
    for name in (*_COORDINATES, *_RENDEZVOUS):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, None),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **_RENDEZVOUS}, World(5, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World(0, 1, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", **_RENDEZVOUS}, World(3, 4, 1)),
        # A shell inside an allocation is not a rank.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_world_from_environment(monkeypatch, environment, world):
    _environment(monkeypatch, environment)
    assert World.from_environment() == world


def test_ranks_without_a_rendezvous_port_are_refused(monkeypatch):
    _environment(monkeypatch, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"})
    with pytest.raises(UserError, match="MASTER_PORT must be set for 4 ranks"):
        World.from_environment()
