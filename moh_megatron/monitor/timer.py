"""Measures the parts of a step without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

PARTS = ("data", "forward", "backward", "optimizer", "save")
_T = TypeVar("_T")


class StepTimer:
    """Adds up the seconds of named parts. On a GPU they are the device's, from events that are read by ``drain``."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to the part ``name``."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def iterate(self, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """Iterate over ``items``, and add the time they take to the part ``name``."""
        iterator = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def drain(self) -> dict[str, float]:
        """Seconds of every part since the last call; on a GPU this waits for the last event."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds
