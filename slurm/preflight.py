#!/usr/bin/env python
"""Tests whether the nodes of a job are fit for the run; srun starts it on every rank. It takes about ten seconds.

.venv/bin/python slurm/preflight.py CONFIG.yaml [section.key=value ...] --report FILE

Each node checks its GPUs, clock, disk and the prepared data. All ranks meet at the first node; then each node
all-reduces a tensor with its right neighbour in the ring of nodes, and with its left one. Rank 0 reports the problems
with the names of the nodes, and writes NODE<tab>MESSAGE to FILE. Exit codes: 0 for fit; 2 for the same problem on all
nodes, which the user must solve; 1 otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from moh_megatron.cli import config_parser, exit_code, parse_config, path_argument
from moh_megatron.config.schema import Config
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.printable import printable
from moh_megatron.train.fault_tolerance import run_store
from moh_megatron.train.fault_tolerance.world import World

logger = logging.getLogger("moh_megatron.slurm.preflight")
"""Below the logger of the package, whose records ``exit_code`` shows."""

MEETING_SECONDS = float(os.environ.get("MOH_MEETING_SECONDS") or "120")
"""How long the first rank waits for the last one: Python may start slowly from a shared disk."""
ROUND_SECONDS = 15.0
"""The time limit of each of the two rounds of all-reduces."""
CLOCK_SECONDS = 5.0
"""The largest difference of clocks: above it, times in files and logs are misleading."""
FREE_GIB = float(os.environ.get("MOH_FREE_GIB") or "20")
ELEMENTS = {"nccl": 2**24, "gloo": 2**18}
EXIT_SECONDS = 5.0


def node_problems(config: Config) -> Iterator[str]:
    """Yield the problems of this node."""
    requested = int(os.environ.get("MOH_GPUS", "0"))
    if (seen := torch.cuda.device_count()) < requested:
        yield f"sees {seen} GPUs, and {requested} were asked for"
    run_dir = Path(config.run.dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            yield f"cannot write to run.dir, {run_dir}"
        free = shutil.disk_usage(run_dir).free / 2**30
        if free < FREE_GIB:
            yield f"{free:.1f} GiB are free in run.dir, {run_dir}; {FREE_GIB:g} are wanted (MOH_FREE_GIB)"
    except OSError as error:
        yield f"cannot use run.dir, {run_dir}: {error.strerror}"
    try:
        load_prepared(config)
    except (UserError, OSError) as error:
        yield f"cannot read the data: {error}"


def neighbours(round_number: int, node: int, nodes: int) -> tuple[int, ...]:
    """Return the nodes that all-reduce with ``node`` in round 0 or 1, in order; itself alone if no partner is left."""
    if nodes == 1:
        return (0,)
    first = (node - round_number) % nodes
    first = (first - first % 2 + round_number) % nodes
    second = (first + 1) % nodes
    # With an odd number of nodes, one has no partner in each round.
    if nodes % 2 and (node - round_number) % nodes == nodes - 1:
        return (node,)
    return (first, second)


class Preflight:
    """The test of one rank. Keys of the store: present/RANK, go, clock/RANK, report/RANK, code, gone/RANK."""

    def __init__(self, world: World, nodes: list[str]) -> None:
        self.world, self.nodes = world, nodes
        self.ranks_per_node = world.size // len(nodes)
        self.node = world.rank // self.ranks_per_node
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.node_problems: list[str] = []
        """On rank 0: the problems that nodes found on themselves, as NODE<tab>MESSAGE."""
        self.found: list[str] = []
        """On rank 0: all problems, in the same form."""
        name, first = nodes[self.node], nodes[0]
        try:
            self.store = self._connect(world.rank == 0)
        except (DistError, OSError) as error:
            raise Fault(
                f"preflight: node {name}: rank {world.rank} cannot reach node {first} at {self.host}:{self.port} in "
                f"{MEETING_SECONDS:g} s ({str(error).splitlines()[0]})"
            ) from None

    def _connect(self, host: bool) -> Store:
        timeout = timedelta(seconds=MEETING_SECONDS)
        store = TCPStore(self.host, self.port, is_master=host, timeout=timeout, wait_for_workers=False)
        return run_store.with_token("preflight", store)

    def meet(self, problems: list[str]) -> bool:
        """Wait for all ranks, collect the nodes' problems, compare clocks; return whether to continue."""
        self.store.set(f"present/{self.world.rank}", json.dumps(problems))
        if self.world.rank:
            self.store.wait(["go"], timedelta(seconds=MEETING_SECONDS + EXIT_SECONDS))
            self.store.set(f"clock/{self.world.rank}", str(time.time()))
            return self.store.get("go") == b"yes"
        absent = self._wait_for("present", MEETING_SECONDS)
        for node, ranks in self._by_node(absent).items():
            late = ", ".join(map(str, ranks))
            self.found.append(f"{self.nodes[node]}\trank {late} did not come to the meeting in {MEETING_SECONDS:g} s")
        for rank in sorted(set(range(self.world.size)) - set(absent)):
            messages = json.loads(self.store.get(f"present/{rank}"))
            self.node_problems += [f"{self.nodes[rank // self.ranks_per_node]}\t{message}" for message in messages]
        self.found += self.node_problems
        sent, fit = time.time(), not self.found
        self.store.set("go", "yes" if fit else "no")
        silent = {*absent, *self._wait_for("clock", ROUND_SECONDS, absent)}
        for node, name in enumerate(self.nodes):
            rank = node * self.ranks_per_node
            if rank and rank not in silent:
                difference = float(self.store.get(f"clock/{rank}")) - sent
                if abs(difference) > CLOCK_SECONDS:
                    self.found.append(f"{name}\tits clock is {difference:+.1f} s from that of {self.nodes[0]}")
        return fit

    def _wait_for(self, key: str, seconds: float, without: list[int] | tuple[int, ...] = ()) -> list[int]:
        """Return the ranks, except rank 0 and those ``without``, whose key is not set after ``seconds``."""
        missing = [rank for rank in range(1, self.world.size) if rank not in without]
        deadline = time.monotonic() + seconds
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not self.store.check([f"{key}/{rank}"])]
            time.sleep(0.05)
        return missing

    def _by_node(self, ranks: list[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for rank in ranks:
            found.setdefault(rank // self.ranks_per_node, []).append(rank)
        return found

    def test_link(self, round_number: int) -> str | None:
        """All-reduce with a neighbour, in a thread that may be abandoned; return the problem, if any."""
        pair = neighbours(round_number, self.node, len(self.nodes))
        outcome: list[str | None] = [f"did not finish in {ROUND_SECONDS:g} s"]

        def run() -> None:
            try:
                self._all_reduce(round_number, pair)
                outcome[0] = None
            except Exception as error:  # any failure of the network is the result
                outcome[0] = f"failed: {str(error).splitlines()[0]}"

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(ROUND_SECONDS)
        return outcome[0]

    def _all_reduce(self, round_number: int, pair: tuple[int, ...]) -> None:
        cuda = torch.cuda.is_available()
        backend = "nccl" if cuda else "gloo"
        device = torch.device("cuda", self.world.local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        size = len(pair) * self.ranks_per_node
        rank = pair.index(self.node) * self.ranks_per_node + self.world.rank % self.ranks_per_node
        dist.init_process_group(
            backend,
            # A separate connection, since waiting blocks the other one.
            store=PrefixStore(f"round{round_number}/{min(pair)}-{max(pair)}", self._connect(False)),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=ROUND_SECONDS - 1),
        )
        try:
            ones = torch.ones(ELEMENTS[backend], device=device)
            dist.all_reduce(ones)
            if not bool((ones == size).all()):
                raise Fault(f"the sum of {size} ones came out as {ones.min().item():g} to {ones.max().item():g}")
        finally:
            dist.destroy_process_group()

    def conclude(self, rounds: list[str | None]) -> int:
        """Let rank 0 collect the results of the rounds; return the same exit code on every rank."""
        self.store.set(f"report/{self.world.rank}", json.dumps(rounds))
        if self.world.rank:
            self.store.wait(["code"], timedelta(seconds=MEETING_SECONDS + 4 * ROUND_SECONDS))
            code = int(self.store.get("code"))
            self.store.set(f"gone/{self.world.rank}", "")
            return code
        # A node may have waited for its time limit in both rounds.
        absent = self._wait_for("report", 2 * ROUND_SECONDS + EXIT_SECONDS)
        if not self.found:
            self.found += [f"{self.nodes[node]}\tsaid nothing" for node in self._by_node(absent)]
            present = [rank for rank in range(self.world.size) if rank not in absent]
            self.found += self._faulty_nodes({rank: json.loads(self.store.get(f"report/{rank}")) for rank in present})
        code = 0 if not self.found else 2 if self._is_user_error() else 1
        self.store.set("code", str(code))
        self._wait_for("gone", EXIT_SECONDS, absent)
        return code

    def _is_user_error(self) -> bool:
        """Return whether all nodes found the same problem on themselves: then the request is wrong, and no node.

        On a single node this counts only in the first start: after a restart, the node has lost what it had before.
        """
        messages = {line.partition("\t")[2] for line in self.node_problems}
        same = len(messages) == 1 and len(self.node_problems) == len(self.found) == len(self.nodes)
        return same and (len(self.nodes) > 1 or os.environ.get("SLURM_RESTART_COUNT", "0") == "0")

    def _faulty_nodes(self, reports: dict[int, list[str | None]]) -> list[str]:
        """Name a node if all its all-reduces failed; otherwise name both nodes of a link."""
        failed: dict[tuple[int, ...], str] = {}
        working: set[int] = set()
        for rank, rounds in reports.items():
            for round_number, outcome in enumerate(rounds):
                pair = neighbours(round_number, rank // self.ranks_per_node, len(self.nodes))
                if outcome is not None:
                    failed.setdefault(pair, outcome)
        for round_number in (0, 1):
            for node in range(len(self.nodes)):
                pair = neighbours(round_number, node, len(self.nodes))
                if pair not in failed and len(pair) > 1:
                    working.update(pair)
        found = []
        for pair, outcome in failed.items():
            names = " and ".join(self.nodes[node] for node in pair)
            culprits = [node for node in pair if node not in working] or list(pair)
            found += [f"{self.nodes[node]}\tthe sum over {names} {outcome}" for node in culprits]
        return found


def report_lines(found: list[str]) -> list[str]:
    """The problems without repetition, each on a line of its own, whatever paths and messages in it hold."""
    parts = (problem.partition("\t") for problem in dict.fromkeys(found))
    return [printable(f"{node}\t{' '.join(message.split())}") for node, _, message in parts]


def main() -> int:
    parser = config_parser("Test whether the nodes of a job are fit for the run.")
    parser.add_argument(
        "--report", type=path_argument, required=True, metavar="FILE", help="file for the problems, one a line"
    )
    arguments, config = parse_config(parser)
    world = World.from_environment() or World(0, 1, 0)
    nodes = os.environ.get("MOH_NODES", socket.gethostname()).split()
    started = time.monotonic()
    run = Preflight(world, nodes)
    fit = run.meet(list(node_problems(config)) if world.local_rank == 0 else [])
    met = time.monotonic()
    rounds = range(2 if len(nodes) > 1 else 1)
    code = run.conclude([run.test_link(number) for number in rounds] if fit else [])
    if world.rank == 0:
        found = report_lines(run.found)
        arguments.report.write_text("".join(f"{line}\n" for line in found), encoding="utf-8")
        for line in found:
            logger.error("preflight: node " + line.replace("\t", ": ", 1))
        if not found:
            logger.info(
                f"preflight: {len(nodes)} nodes, {world.size} ranks are fit; they met after {met - started:.1f} s, "
                f"and their sums took {time.monotonic() - met:.1f} s"
            )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # An abandoned thread may still hang.


if __name__ == "__main__":
    sys.exit(exit_code(main))
