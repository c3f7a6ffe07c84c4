#!/usr/bin/env python
"""Time sparse attention against dense causal SDPA with the same mask, and against its own dense case.

python tools/bench_attention.py [--lengths 512 1024 2048] [--pairs 7] [--threads 1] [--plot bench.png]

Within one process the candidates take turns (A B A B ...), so that a machine that slows down slows all of them; what is
printed are the median and the range of the ratio within each turn. Peak memory is the largest rise above what a
forward and backward pass starts with, measured once in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from moh_megatron.moh import sparse_attention
from moh_megatron.moh.backends.dense import causal_attention


class Shape(NamedTuple):
    """Query heads, KV groups and head size at one length."""

    name: str
    heads: int
    groups: int
    size: int
    length: int


class Row(NamedTuple):
    """One line of the table: the ratio of times over dense, and over the backend with every head active."""

    shape: Shape
    share: float
    backend: str
    backward: bool
    over_dense: list[float]
    over_own_full: list[float]
    megabytes: float
    dense_megabytes: float


def shapes(length: int) -> list[Shape]:
    """Multi-head and grouped-query attention; fewer heads where long sequences ask for memory and patience."""
    few = length >= 4096
    return [
        Shape("MHA", 4 if few else 12, 4 if few else 12, 64, length),
        Shape("GQA", 4 if few else 8, 1 if few else 2, 128, length),
    ]


def inputs(shape: Shape, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Leaves q, k, v, a routing of which a quarter of the heads is shared, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    length, heads, size = shape.length, shape.heads, shape.size
    q, k, v = (
        torch.randn(length, 1, n, size, generator=generator).requires_grad_()
        for n in (heads, shape.groups, shape.groups)
    )
    shared = heads // 4
    active = torch.ones(length, 1, heads, dtype=torch.bool)
    scores = torch.rand(length, 1, heads - shared, generator=generator)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    active[..., shared:] = rank < round(heads * share) - shared
    return q, k, v, active, torch.randn(length, 1, heads, size, generator=generator)


def candidate(backend: str, shape: Shape, share: float, backward: bool) -> Callable[[], None]:
    """One pass, ready to be timed. ``sdpa`` is dense attention times the mask, as one would write it without us."""
    q, k, v, active, d_out = inputs(shape, share)

    def run() -> None:
        for leaf in (q, k, v):
            leaf.grad = None
        with torch.set_grad_enabled(backward):
            if backend == "sdpa":
                out = causal_attention(q, k, v) * active.unsqueeze(-1)
            else:
                out = sparse_attention(q, k, v, active, backend=backend)  # type: ignore[arg-type]
        if backward:
            out.backward(d_out)

    return run


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _resident_peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _peak(arguments: tuple[str, Shape, float, bool]) -> float:
    torch.set_num_threads(1)
    run = candidate(*arguments)
    # Forget the peak of the start-up (Linux): 5 resets VmHWM to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident_peak()
    run()
    return (_resident_peak() - before) / 1024


def peak_megabytes(*arguments: Any) -> float:
    """Rise of the peak resident memory during one pass, in a fresh process, MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(_peak, [arguments])[0]


def measure(shape: Shape, share: float, backends: list[str], backward: bool, pairs: int) -> list[Row]:
    """All backends of one shape, in turns."""
    runs = {"sdpa": candidate("sdpa", shape, share, backward)}
    for backend in backends:
        runs[backend] = candidate(backend, shape, share, backward)
        runs[f"{backend} full"] = candidate(backend, shape, 1.0, backward)
    for run in runs.values():
        run()
    turns = [{name: _seconds(run) for name, run in runs.items()} for _ in range(pairs)]
    dense_peak = peak_megabytes("sdpa", shape, share, backward)
    return [
        Row(
            shape,
            share,
            backend,
            backward,
            [turn[backend] / turn["sdpa"] for turn in turns],
            [turn[backend] / turn[f"{backend} full"] for turn in turns],
            peak_megabytes(backend, shape, share, backward),
            dense_peak,
        )
        for backend in backends
    ]


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [
        "| S | heads/groups x size | active | pass | backend | over SDPA (range) | over own 100 % | MiB (SDPA's) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shape, ratios = row.shape, row.over_dense
        lines.append(
            f"| {shape.length} | {shape.name} {shape.heads}/{shape.groups} x {shape.size} | {row.share:.0%} "
            f"| {'fwd + bwd' if row.backward else 'fwd'} | {row.backend} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) "
            f"| {statistics.median(row.over_own_full):.2f} | {row.megabytes:.0f} ({row.dense_megabytes:.0f}) |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: str) -> None:
    """Ratio to SDPA over length, a line for each backend and share; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, kind in zip(axes, ("MHA", "GQA"), strict=True):
        series: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.shape.name == kind and row.backward:
                point = (row.shape.length, statistics.median(row.over_dense))
                series.setdefault(f"{row.backend}, {row.share:.0%} active", []).append(point)
        for label, points in series.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=kind, xscale="log", xlabel="sequence length", ylabel="time / dense SDPA, fwd + bwd")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sparse attention against dense causal SDPA.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--backends", nargs="+", default=["cpu", "gathered", "auto"])
    parser.add_argument("--pairs", type=int, default=7, help="turns each candidate takes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forward", action="store_true", help="time the forward pass alone as well")
    parser.add_argument("--plot", metavar="FILE.png")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [
        (shape, share, backward)
        for length in arguments.lengths
        for shape in shapes(length)
        for share in arguments.shares
        for backward in ((False, True) if arguments.forward else (True,))
    ]
    rows: list[Row] = []
    for shape, share, backward in tqdm(cases, desc="bench", unit="case"):
        rows += measure(shape, share, arguments.backends, backward, arguments.pairs)
    print(f"{arguments.threads} thread(s), torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, fp32")
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
