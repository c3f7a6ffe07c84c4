"""Measures what the time from the launch of a run to its first finished step was spent on."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE


def process_age(process: int) -> float:
    """Seconds since a process was started (Linux)."""
    ticks = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class StartupClock:
    """Seconds of named parts, in order. Make one when the imports are done: they are its first part."""

    def __init__(self) -> None:
        age = process_age(os.getpid())
        self.seconds: dict[str, float] = {}
        """Seconds of each part."""
        if launcher := os.environ.get(PARENT_VARIABLE):
            # A launcher that was killed meanwhile has no entry; its end is reported elsewhere.
            with contextlib.suppress(OSError):
                self.seconds["launcher"] = max(0.0, process_age(int(launcher)) - age)
        self.seconds["imports"] = age
        self._since = time.monotonic()

    def mark(self, part: str) -> None:
        """End ``part``, which began where the part before it ended."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s from launch to the end of the first step: {parts}"
