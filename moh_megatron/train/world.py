"""Which rank of how many this process is, told by the environment of a launcher."""

from __future__ import annotations

import os
from dataclasses import dataclass

PARENT_VARIABLE = "MOH_LAUNCHER_PID"
"""Set by our own launcher: the process that reports on all ranks."""


@dataclass(frozen=True)
class World:
    """Global rank, number of ranks, and rank on this node."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World:
        """From RANK, WORLD_SIZE and LOCAL_RANK (ours and torchrun's names); without them, the only rank."""
        value = os.environ.get
        return cls(int(value("RANK", "0")), int(value("WORLD_SIZE", "1")), int(value("LOCAL_RANK", "0")))
