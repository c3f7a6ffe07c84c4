"""Measures time in interleaved turns, and memory in processes of their own, for the bench scripts beside this file."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Turn = dict[str, float]
"""Seconds of each candidate in one turn."""


def take_turns(runs: Mapping[str, Callable[[], None]], turns: int) -> list[Turn]:
    """Time all candidates one after another, ``turns`` times (A B A B ...), after a first pass that is not timed.

    A machine that slows down then slows all of them: compare candidates within a turn. On one thread the time is this
    process's CPU time, to which other programs add little; on several threads it is wall-clock time.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    return [{name: _seconds(run, clock) for name, run in runs.items()} for _ in range(turns)]


def _seconds(run: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def _resident_peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _peak(make: Callable[..., Callable[[], None]], *arguments: Any) -> float:
    torch.set_num_threads(1)
    run = make(*arguments)
    # Writing 5 resets VmHWM, the peak of the start-up, to the current resident size (Linux).
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    run()
    return (_resident_peak() - before) / 1024


def peak_megabytes(make: Callable[..., Callable[[], None]], *arguments: Any) -> float:
    """The increase of the peak resident memory during one pass in a fresh process on one thread, in MiB.

    ``make(*arguments)`` returns the pass; it is a function of a module, for the other process to find.
    """
    # A fixed threshold makes malloc return what is freed to the system at once; by default it learns to keep more.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    # Processes are forked from a server that has imported torch but computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "moh_megatron.moh"])
    with context.Pool(1) as pool:
        return pool.apply(_peak, (make, *arguments))


def ratios(turns: Iterable[Turn], name: str, over: str) -> list[float]:
    """The time of ``name`` over that of ``over``, for each turn."""
    return [turn[name] / turn[over] for turn in turns]


def median_and_range(values: Sequence[float], digits: int = 2) -> str:
    """0.50 (0.48-0.53)"""
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(statistics.median(values), min(values), max(values), d=digits)


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def circumstances() -> str:
    """The circumstances that the figures depend on, in one line."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {capability}, fp32"
