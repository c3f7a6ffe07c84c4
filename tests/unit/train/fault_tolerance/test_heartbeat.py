"""The process that hosts the store, and the messages when it cannot be reached."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from moh_megatron.train.fault_tolerance.heartbeat import StoreHost
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def host_at(port: int, monkeypatch: pytest.MonkeyPatch, rank: int = 1, **environment: str) -> StoreHost:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", PARENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}.items():
        monkeypatch.setenv(name, value)
    return StoreHost.from_environment(World(rank, 4, rank))


def test_environment_of_the_launcher_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    agent_store = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert [host_at(29500, monkeypatch, rank).is_self for rank in range(2)] == [True, False]
    assert host_at(29500, monkeypatch).ranks == [0]
    agent = host_at(29500, monkeypatch, 0, **agent_store)
    assert (agent.name, agent.ranks, agent.is_self) == ("torchrun's agent", [], False)
    launcher = host_at(29500, monkeypatch, 0, **agent_store, **{PARENT_VARIABLE: "77"})
    assert (launcher.name, launcher.ranks, launcher.is_self) == ("the launcher (process 77)", [], False)


def test_stopped_host_is_distinguished_from_a_dead_one(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The port of a stopped process stays open, that of a dead one does not."""
    host = host_at(port := listener.getsockname()[1], monkeypatch)
    stopped = host.silent(8)
    assert f"rank 0 is missing: the store it hosts at 127.0.0.1:{port} has not answered for 8 s" in stopped.message
    listener.close()
    gone = host.silent(8)
    assert gone.message == f"rank 0 is gone: the store at 127.0.0.1:{port} has closed."
    assert stopped.missing == gone.missing == [0]


def test_host_on_a_machine_that_does_not_answer_counts_as_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    host = host_at(29500, monkeypatch, MASTER_ADDR="no-such-machine.invalid")
    assert "has not answered for 8 s" in host.silent(8).message


def test_host_that_never_came_up_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    report = host_at(29500, monkeypatch).absent(1, 120)
    assert f"rank 0 did not come up within 120 s of rank 1 on {socket.gethostname()}" in report.message
    assert "MASTER_ADDR and MASTER_PORT are the same on every rank" in report.message
    assert (report.missing, report.code) == ([0], 1)
