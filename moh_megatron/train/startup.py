"""What the time from launch to the first finished step went into."""

from __future__ import annotations

import os
import time
from pathlib import Path

from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE


def process_age(process: int) -> float:
    """Seconds since a process was started (Linux)."""
    ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class StartupClock:
    """Named parts, in order; made when the imports are done, which are its first part."""

    def __init__(self) -> None:
        own = process_age(os.getpid())
        self.seconds: dict[str, float] = {}
        """What each part took."""
        if launcher := os.environ.get(PARENT_VARIABLE):
            self.seconds["launcher"] = max(0.0, process_age(int(launcher)) - own)
        self.seconds["imports"] = own
        self._since = time.monotonic()

    def mark(self, part: str) -> None:
        """``part`` is done; it began where the one before it ended."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s from launch to the end of the first step: {parts}"
