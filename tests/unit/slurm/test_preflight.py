"""slurm/preflight.py: the problems it reports and the nodes it names. Its ranks are threads."""

from __future__ import annotations

import importlib.util
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from moh_megatron.train.fault_tolerance.world import World

ROUND = 0.4


@pytest.fixture
def preflight(monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", Path(__file__).parents[3] / "slurm/preflight.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert 2 * module.ROUND_SECONDS <= 30
    for name, seconds in (("ROUND_SECONDS", ROUND), ("EXIT_SECONDS", 1.0), ("MEETING_SECONDS", 10.0)):
        monkeypatch.setattr(module, name, seconds)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return module


def meet(
    preflight: ModuleType,
    nodes: list[str],
    problems: dict[int, list[str]] | None = None,
    sums: Callable[[int, tuple[int, ...]], None] = lambda node, pair: None,
) -> tuple[set[int], list[str]]:
    """Run one rank a node; return the exit codes and the problems. ``sums`` replaces the all-reduce of a node."""
    codes, found = set(), []

    def rank(number: int) -> None:
        run = preflight.Preflight(World(number, len(nodes), 0), nodes)
        run._all_reduce = lambda round_number, pair: sums(number, pair)
        fit = run.meet((problems or {}).get(number, []))
        codes.add(run.conclude([run.test_link(number) for number in (0, 1)] if fit else []))
        found.extend(run.found)

    threads = [threading.Thread(target=rank, args=(number,), name=str(number)) for number in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return codes, found


def test_fit_nodes_pass(preflight):
    assert meet(preflight, ["n1", "n2", "n3"]) == ({0}, [])


def test_wrong_clock_is_reported(preflight, monkeypatch):
    ahead = {"1": 60.0}
    clock = SimpleNamespace(
        time=lambda: time.time() + ahead.get(threading.current_thread().name, 0),
        monotonic=time.monotonic,
        sleep=time.sleep,
    )
    monkeypatch.setattr(preflight, "time", clock)
    codes, found = meet(preflight, ["n1", "n2"])
    assert codes == {1}
    (line,) = found
    assert line.startswith("n2\tits clock is +60.")
    assert line.endswith(" s from that of n1")


def test_all_reduce_that_hangs_is_abandoned(preflight):
    started = time.monotonic()
    codes, found = meet(preflight, ["n1", "n2"], sums=lambda node, pair: time.sleep(3) if node == 1 else None)
    assert codes == {1}
    assert {line.split("\t")[0] for line in found} == {"n1", "n2"}
    assert all(line.endswith(f" did not finish in {ROUND:g} s") for line in found)
    assert time.monotonic() - started < 2 * ROUND + 2


def test_node_whose_all_reduces_all_fail_is_named_alone(preflight):
    def sums(node: int, pair: tuple[int, ...]) -> None:
        if 2 in pair:
            raise RuntimeError("Connection refused\nwith a stack")

    codes, found = meet(preflight, ["n1", "n2", "n3", "n4"], sums=sums)
    assert codes == {1}
    assert {line.split("\t")[0] for line in found} == {"n3"}
    assert all(line.endswith("failed: Connection refused") for line in found)


def test_both_nodes_of_a_failed_link_are_named(preflight):
    def sums(node: int, pair: tuple[int, ...]) -> None:
        if pair == (0, 1):
            raise RuntimeError("reset")

    _, found = meet(preflight, ["n1", "n2", "n3", "n4"], sums=sums)
    assert sorted(found) == [f"{name}\tthe sum over n1 and n2 failed: reset" for name in ("n1", "n2")]


def test_problem_of_a_node_is_reported(preflight):
    codes, found = meet(preflight, ["n1", "n2"], {1: ["sees 7 GPUs, and 8 were asked for"]})
    assert (codes, found) == ({1}, ["n2\tsees 7 GPUs, and 8 were asked for"])


@pytest.mark.parametrize(
    ("nodes", "restart", "code"),
    [
        (["n1", "n2"], "0", 2),
        (["n1", "n2"], "3", 2),
        (["n1"], "0", 2),
        # The node was fit when the job began, so that another node may work.
        (["n1"], "3", 1),
    ],
)
def test_same_problem_on_all_nodes_is_a_user_error_of_the_request(preflight, monkeypatch, nodes, restart, code):
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    codes, found = meet(preflight, nodes, {number: ["sees 0 GPUs"] for number in range(len(nodes))})
    assert codes == {code}
    assert found == [f"{name}\tsees 0 GPUs" for name in nodes]


def test_each_problem_is_one_printable_line_of_the_report(preflight):
    found = ["n1\tcannot use run.dir, a\x1b[2J\nn2\tb", "n1\tits clock is off", "n1\tits clock is off"]
    assert preflight.report_lines(found) == ["n1\tcannot use run.dir, a\\x1b[2J n2 b", "n1\tits clock is off"]
