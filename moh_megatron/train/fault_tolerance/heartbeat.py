"""Exchanges heartbeats and failure reports between ranks through the run's store, apart from torch.distributed."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, Store

from moh_megatron.io.errors import Fault
from moh_megatron.train.fault_tolerance import run_store
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World


@dataclass(frozen=True)
class Heartbeat:
    """The last state that a rank published."""

    count: int
    """Grows with each heartbeat: a rank whose count does not change is dead or stopped."""
    step: int
    phase: str
    host: str
    position: str
    """Where its main thread is in the Python code."""
    waiting: bool
    """Whether that position is inside a collective, where it waits for other ranks."""
    stuck: bool
    """Whether it has made no progress for longer than its phase allows."""
    exit_reason: str | None = None
    """Why it ends, if it fails; empty where it only lost contact with the others."""
    user_error: bool = False
    """Whether the user made the mistake that ends it."""


@dataclass(frozen=True)
class FailureReport:
    """The message that all ranks end with, and the ranks that cannot show it themselves."""

    message: str
    missing: list[int]
    user_error: bool = False
    """Whether the user made the mistake: exit code 2 in place of 1."""

    @property
    def code(self) -> int:
        return 2 if self.user_error else 1


@dataclass(frozen=True)
class StoreHost:
    """The process that hosts the run's store: rank 0, our launcher or torchrun's agent."""

    name: str
    address: str
    ranks: list[int]
    """The ranks that are missing when this process is."""
    is_self: bool
    """Whether it is this process."""

    @classmethod
    def from_environment(cls, world: World) -> StoreHost:
        """Return the host that the launcher's environment variables name."""
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if not run_store.hosted_by_launcher():
            return cls("rank 0", address, [0], world.rank == 0)
        launcher = os.environ.get(PARENT_VARIABLE)
        return cls(f"the launcher (process {launcher})" if launcher else "torchrun's agent", address, [], False)

    def absent(self, rank: int, seconds: float) -> FailureReport:
        """Report that the host did not come up within ``seconds`` of ``rank``."""
        return FailureReport(
            f"{self.name} did not come up within {seconds:.0f} s of rank {rank} on {socket.gethostname()}: the "
            f"store at {self.address} cannot be reached. See whether it runs, and whether MASTER_ADDR and MASTER_PORT "
            f"are the same on every rank.",
            self.ranks,
        )

    def closed(self) -> FailureReport:
        """Report that the host has ended."""
        return FailureReport(f"{self.name} is gone: the store at {self.address} has closed.", self.ranks)

    def silent(self, seconds: float) -> FailureReport:
        """Report that the host has not answered for ``seconds``: ended if nobody listens on its port, else stopped."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return self.closed()
        except OSError:
            pass  # The machine does not answer either.
        silence = f"the store it hosts at {self.address} has not answered for {seconds:.0f} s"
        return FailureReport(f"{self.name} is missing: {silence}. Stopped, or its machine is gone.", self.ranks)


class FailureReports:
    """The failure report that all ranks and the launcher agree on, and why single ranks ended."""

    def __init__(self, store: Store) -> None:
        # torchrun's store outlives the ranks it starts again.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = run_store.with_token(f"heartbeat_{restart}", store)

    def declare(self, report: FailureReport) -> FailureReport:
        """Propose ``report``; return the one that was proposed first, which counts for all processes."""
        return FailureReport(**json.loads(self._store.compare_set("failure_report", "", json.dumps(asdict(report)))))

    def agreed(self) -> FailureReport | None:
        """Return the report that counts, if there is one."""
        found = self._store.check(["failure_report"])
        return FailureReport(**json.loads(self._store.get("failure_report"))) if found else None

    def exit_reason(self, rank: int) -> str | None:
        """Return why ``rank`` ended, in its own words."""
        return json.loads(self._store.get(str(rank)))["exit_reason"] if self._store.check([str(rank)]) else None


class Heartbeats(FailureReports):
    """The heartbeats of all ranks, in a store hosted by rank 0, our launcher or torchrun's agent.

    Waits for ``host`` to come up, for ``timeout`` seconds or longer (torch's client may try once more after that). Its
    methods block while the host does not answer and raise DistError where it has ended: use them in a separate thread.
    """

    def __init__(self, world: World, host: StoreHost, timeout: float) -> None:
        self._world, self.hosted_by_self = world, host.is_self
        try:
            # A separate connection: a collective of the main thread may hold the other one for long.
            store = run_store.connect(world, timedelta(seconds=timeout))
        except DistError as error:
            raise Fault(f"{host.absent(world.rank, timeout).message} ({str(error).splitlines()[0]})") from None
        super().__init__(store)
        self._present: set[int] = set()

    def publish(self, heartbeat: Heartbeat) -> None:
        """Publish the state of this rank."""
        self._store.set(str(self._world.rank), json.dumps(asdict(heartbeat)))

    def read(self, ranks: range) -> dict[int, Heartbeat]:
        """Return the newest heartbeat of each of ``ranks`` that has come up."""
        self._present |= {rank for rank in ranks if rank not in self._present and self._store.check([str(rank)])}
        known = [rank for rank in ranks if rank in self._present]
        values = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Heartbeat(**json.loads(value)) for rank, value in zip(known, values, strict=True)}

    def count(self, name: str, increment: int) -> int:
        """Add ``increment`` to a counter that all ranks share; return its value after that."""
        return self._store.add(name, increment)

    def decide(self, name: str, proposal: str) -> str:
        """Return the answer that was proposed first, or "" if there is none; an empty ``proposal`` only reads it."""
        if proposal:
            return self._store.compare_set(name, "", proposal).decode()
        return self._store.get(name).decode() if self._store.check([name]) else ""
