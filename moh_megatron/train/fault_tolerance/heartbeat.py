"""Signs of life: what each rank tells the others through the run's store, beside torch.distributed's own traffic."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from moh_megatron.io.errors import Fault
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself."""

    count: int
    """Grows with each beat: a rank whose count stands still is gone, or stopped."""
    step: int
    phase: str
    host: str
    place: str
    """Where its main thread stands in the Python code."""
    waiting: bool
    """Whether that is inside a collective, where it waits for others."""
    stuck: bool
    """Whether it has made no progress for longer than its phase allows."""
    left: str | None = None
    """Why it leaves, if it fails; empty where it only lost the others."""
    mistake: bool = False
    """Whether that is the user's mistake."""


@dataclass(frozen=True)
class FailureReport:
    """What all ranks are to end with, and the ranks that cannot say it themselves."""

    message: str
    missing: list[int]
    mistake: bool = False
    """Of the user: exit code 2 in place of 1."""

    @property
    def code(self) -> int:
        return 2 if self.mistake else 1


@dataclass(frozen=True)
class StoreHost:
    """Whose process the run's store is, and where: rank 0's, the launcher's, or that of torchrun's agent."""

    name: str
    address: str
    ranks: list[int]
    """Which ranks go with it."""
    here: bool

    @classmethod
    def of(cls, world: World) -> StoreHost:
        """As the launcher's environment says."""
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return cls("rank 0", address, [0], world.rank == 0)
        launcher = os.environ.get(PARENT_VARIABLE)
        return cls(f"the launcher (process {launcher})" if launcher else "torchrun's agent", address, [], False)

    def absent(self, rank: int, patience: float) -> FailureReport:
        """It did not come up within ``patience`` seconds of ``rank``."""
        return FailureReport(
            f"{self.name} did not come up within {patience:.0f} s of rank {rank} on {socket.gethostname()}: the "
            f"store at {self.address} cannot be reached. See whether it runs, and whether MASTER_ADDR and MASTER_PORT "
            f"are the same on every rank.",
            self.ranks,
        )

    def closed(self) -> FailureReport:
        return FailureReport(f"{self.name} is gone: the store at {self.address} has closed.", self.ranks)

    def silent(self, patience: float) -> FailureReport:
        """It has not answered for ``patience`` seconds: closed where nobody listens there any more, else stopped."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except ConnectionRefusedError:
            return self.closed()
        except OSError:
            pass  # the machine does not answer either
        silence = f"the store it hosts at {self.address} has not answered for {patience:.0f} s"
        return FailureReport(f"{self.name} is missing: {silence}. Stopped, or its machine is gone.", self.ranks)


class FailureReports:
    """What one side of a run may know of the other: the last words of a rank, and the common verdict."""

    def __init__(self, store: Store) -> None:
        # torchrun's store outlives the ranks it starts again.
        self._store = PrefixStore(f"heartbeat_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def declare(self, verdict: FailureReport) -> FailureReport:
        """Make ``verdict`` the common one, unless another process was quicker; returns the one that counts."""
        return FailureReport(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))))

    def verdict(self) -> FailureReport | None:
        return FailureReport(**json.loads(self._store.get("verdict"))) if self._store.check(["verdict"]) else None

    def last_words(self, rank: int) -> str | None:
        """Why ``rank`` left, as it said itself."""
        return json.loads(self._store.get(str(rank)))["left"] if self._store.check([str(rank)]) else None


class Heartbeats(FailureReports):
    """The beats of all ranks and one verdict, in a store of rank 0's process or of the launcher's.

    Waits for ``host`` to come up, for ``patience`` seconds or longer (torch's client may begin once more when they are
    over), blocks while it does not answer, and raises DistError where it is gone: for a thread of its own.
    """

    def __init__(self, world: World, host: StoreHost, patience: float) -> None:
        self._world, self.hosted_here = world, host.here
        try:
            # Its own connection: a collective of the main thread may hold the other one for long.
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=host.here,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistError as error:
            raise Fault(f"{host.absent(world.rank, patience).message} ({str(error).splitlines()[0]})") from None
        super().__init__(store)
        self._present: set[int] = set()

    def publish(self, beat: Heartbeat) -> None:
        self._store.set(str(self._world.rank), json.dumps(asdict(beat)))

    def read(self, ranks: range) -> dict[int, Heartbeat]:
        """The newest beat of each of ``ranks`` that has come up."""
        self._present |= {rank for rank in ranks if rank not in self._present and self._store.check([str(rank)])}
        known = [rank for rank in ranks if rank in self._present]
        beats = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Heartbeat(**json.loads(beat)) for rank, beat in zip(known, beats, strict=True)}

    def count(self, name: str, more: int) -> int:
        """Add to a common counter; returns what it is then."""
        return self._store.add(name, more)

    def decide(self, name: str, proposal: str) -> str:
        """Propose an answer to a common question, or nothing with an empty text; returns what was proposed first."""
        if proposal:
            return self._store.compare_set(name, "", proposal).decode()
        return self._store.get(name).decode() if self._store.check([name]) else ""
