#!/usr/bin/env python
"""Measures sparse attention against dense causal SDPA with the same mask, and against itself with every head active.

.venv/bin/python tools/bench_attention.py [--lengths 512 1024 2048] [--turns 7] [--threads 1] [--plot bench.png]
.venv/bin/python tools/bench_attention.py --routing-groups kv [--backends slots cpu] [--shares 0.5 0.75] ...

With --routing-groups kv every token uses the same number of heads in each KV group, as the backend slots needs.
Within one process all candidates of a shape take turns (A B A B ...), so that a slower machine slows all of them. The
printed numbers are the median and the range of the ratio within each turn. Peak memory is the increase of resident
memory during one pass, measured once in a separate process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from timing import circumstances, markdown, median_and_range, peak_megabytes, ratios, take_turns
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
    routing_groups: int = 1
    """The groups of consecutive heads in each of which a token uses equally many."""


class Row(NamedTuple):
    """One line of the table: the ratios of times to dense attention, and to the backend with every head active."""

    shape: Shape
    share: float
    backend: str
    backward: bool
    over_dense: list[float]
    over_own_full: list[float]
    megabytes: float
    dense_megabytes: float


_HEADS_AT = {"MHA": {4096: 4, 8192: 4}, "GQA": {2048: 16, 4096: 4, 8192: 4}}
"""The number of heads for long sequences, smaller to save time; all heads of a KV group cost the same."""


def shapes(length: int, *, in_groups: bool = False) -> list[Shape]:
    """Multi-head attention of 12 heads of size 64, and grouped-query attention of 32 heads of size 128 in 8 groups.

    With ``in_groups``, where heads are chosen within KV groups: grouped-query attention of 16 heads of size 64 in 4
    groups, and of 32 heads of size 128 in 8 groups, at every length.
    """
    if in_groups:
        return [Shape("GQA", 16, 4, 64, length, 4), Shape("GQA", 32, 8, 128, length, 8)]
    multi, grouped = _HEADS_AT["MHA"].get(length, 12), _HEADS_AT["GQA"].get(length, 32)
    return [Shape("MHA", multi, multi, 64, length), Shape("GQA", grouped, grouped // 4, 128, length)]


def inputs(shape: Shape, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Leaf tensors q, k and v, the active heads with a quarter of all heads shared, and a gradient of the output.

    A token uses ``share`` of the heads of each routing group, the first quarter of which is shared.
    """
    generator = torch.Generator().manual_seed(0)
    length, heads, size = shape.length, shape.heads, shape.size
    q, k, v = (
        torch.randn(length, 1, n, size, generator=generator).requires_grad_()
        for n in (heads, shape.groups, shape.groups)
    )
    width = heads // shape.routing_groups
    shared = width // 4
    active = torch.ones(length, 1, shape.routing_groups, width, dtype=torch.bool)
    scores = torch.rand(length, 1, shape.routing_groups, width - shared, generator=generator)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    active[..., shared:] = rank < round(width * share) - shared
    return q, k, v, active.flatten(2), torch.randn(length, 1, heads, size, generator=generator)


def candidate(backend: str, shape: Shape, share: float, backward: bool) -> Callable[[], None]:
    """One pass to be timed. ``sdpa`` is torch's dense attention times the mask."""
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


def measure(shape: Shape, shares: list[float], backends: list[str], backward: bool, turns: int) -> list[Row]:
    """Measure all backends at all shares of one shape in turns, and with every head active in any case."""
    runs = {"sdpa": candidate("sdpa", shape, 1.0, backward)}
    cases = [(backend, share) for backend in backends for share in shares]
    for backend, share in dict.fromkeys([*cases, *((backend, 1.0) for backend in backends)]):
        runs[f"{backend} {share}"] = candidate(backend, shape, share, backward)
    taken = take_turns(runs, turns)
    dense_peak = peak_megabytes(candidate, "sdpa", shape, 1.0, backward)
    return [
        Row(
            shape,
            share,
            backend,
            backward,
            ratios(taken, f"{backend} {share}", "sdpa"),
            ratios(taken, f"{backend} {share}", f"{backend} 1.0"),
            peak_megabytes(candidate, backend, shape, share, backward),
            dense_peak,
        )
        for backend, share in cases
    ]


def table(rows: list[Row]) -> str:
    """The results as a Markdown table."""
    head = ["S", "heads/groups x size", "active", "pass", "backend", "over SDPA (range)", "over own 100 %"]
    lines = (
        [
            row.shape.length,
            f"{row.shape.name} {row.shape.heads}/{row.shape.groups} x {row.shape.size}",
            f"{row.share:.0%}",
            "fwd + bwd" if row.backward else "fwd",
            row.backend,
            median_and_range(row.over_dense),
            f"{statistics.median(row.over_own_full):.2f}",
            f"{row.megabytes:.0f} ({row.dense_megabytes:.0f})",
        ]
        for row in rows
    )
    return markdown([*head, "MiB (SDPA's)"], lines)


def plot(rows: list[Row], path: str) -> None:
    """Plot the ratio to SDPA over length, forward + backward; colours are shares, line styles are backends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row.shape.length for row in rows})
    colours = {share: f"C{index}" for index, share in enumerate(dict.fromkeys(row.share for row in rows))}
    styles = dict(zip(dict.fromkeys(row.backend for row in rows), ("-", "--", ":", "-."), strict=False))
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    kinds = dict.fromkeys((row.shape.name, row.shape.size) for row in rows)
    for axis, kind in zip(axes, kinds, strict=True):
        series: dict[tuple[str, float], list[tuple[int, float]]] = {}
        for row in rows:
            if (row.shape.name, row.shape.size) == kind and row.backward:
                point = (row.shape.length, statistics.median(row.over_dense))
                series.setdefault((row.backend, row.share), []).append(point)
        for (backend, share), points in series.items():
            label = f"{backend}, {share:.0%} active"
            axis.plot(*zip(*points, strict=True), styles[backend], color=colours[share], marker=".", label=label)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set(title=f"{kind[0]}, heads of size {kind[1]}", xlabel="sequence length", ylim=(0, None))
    axes[0].set_ylabel("time / dense SDPA, forward + backward")
    axes[1].legend(fontsize=7, ncols=2, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure sparse attention against dense causal SDPA.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 1.0])
    parser.add_argument("--routing-groups", choices=["1", "kv"], default="1", help="as moh.routing_groups")
    parser.add_argument("--backends", nargs="+", help="cpu gathered auto; with --routing-groups kv: slots cpu auto")
    parser.add_argument("--turns", type=int, default=7, help="number of turns of each candidate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE.png")
    arguments = parser.parse_args()
    in_groups = arguments.routing_groups == "kv"
    backends = arguments.backends or (["slots", "cpu", "auto"] if in_groups else ["cpu", "gathered", "auto"])
    if "slots" in backends and not in_groups:
        parser.error("--backends slots needs --routing-groups kv: every KV group must have as many active heads.")
    if in_groups and any(4 * share not in (1, 2, 3, 4) for share in arguments.shares):
        parser.error(f"--shares must be of 0.25 0.5 0.75 1.0 with --routing-groups kv. Got {arguments.shares}.")
    torch.set_num_threads(arguments.threads)
    cases = [
        (shape, backward)
        for length in arguments.lengths
        for shape in shapes(length, in_groups=in_groups)
        for backward in (False, True)
    ]
    rows: list[Row] = []
    for shape, backward in tqdm(cases, desc="bench", unit="case"):
        rows += measure(shape, arguments.shares, backends, backward, arguments.turns)
    print(circumstances())
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
        print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    main()
