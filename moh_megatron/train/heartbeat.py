"""Signs of life: what each rank tells the others through the run's store, beside torch.distributed's own traffic."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, TCPStore

from moh_megatron.config.errors import Fault
from moh_megatron.train.world import World

_CONNECT_SECONDS = 600


@dataclass(frozen=True)
class Beat:
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


@dataclass(frozen=True)
class Verdict:
    """What all ranks are to end with, and the ranks that cannot say it themselves."""

    message: str
    missing: list[int]


class Heartbeats:
    """The beats of all ranks and one verdict, in a store of rank 0's process or of the launcher's.

    Blocks while the store does not answer, and raises DistError where it is gone: for a thread of its own.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hosted_elsewhere = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            # Its own connection: a collective of the main thread may hold the other one for long.
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=world.rank == 0 and not hosted_elsewhere,
                timeout=timedelta(seconds=_CONNECT_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistError as error:
            raise Fault(
                f"rank {world.rank} on {socket.gethostname()} cannot reach rank 0 at {self.address} within "
                f"{_CONNECT_SECONDS} s ({str(error).splitlines()[0]}). See whether rank 0 runs, and whether "
                f"MASTER_ADDR and MASTER_PORT are the same on every rank."
            ) from None
        # torchrun's store outlives the ranks it starts again.
        self._store = PrefixStore(f"heartbeat_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._present: set[int] = set()

    def publish(self, beat: Beat) -> None:
        self._store.set(str(self._world.rank), json.dumps(asdict(beat)))

    def read(self, ranks: range) -> dict[int, Beat]:
        """The newest beat of each of ``ranks`` that has come up."""
        self._present |= {rank for rank in ranks if rank not in self._present and self._store.check([str(rank)])}
        known = [rank for rank in ranks if rank in self._present]
        beats = self._store.multi_get([str(rank) for rank in known]) if known else []
        return {rank: Beat(**json.loads(beat)) for rank, beat in zip(known, beats, strict=True)}

    def declare(self, verdict: Verdict) -> Verdict:
        """Make ``verdict`` the common one, unless another rank was quicker; returns the one that counts."""
        return Verdict(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))))

    def verdict(self) -> Verdict | None:
        return Verdict(**json.loads(self._store.get("verdict"))) if self._store.check(["verdict"]) else None

    def count(self, name: str, more: int) -> int:
        """Add to a common counter; returns what it is then."""
        return self._store.add(name, more)
