#!/usr/bin/env python
"""Trains small models that differ in how heads are chosen, and writes the table of their validation losses.

.venv/bin/python tools/compare_routing.py FOLDER --out table.md [--seeds 1 2 3] [--workers 2] [KEY=VALUE ...]

Every arm learns the smoke run's text from scratch with 8 heads in 2 KV groups, in one process of one thread: a dense
model, and MoH models that use 50 and 75 % of the heads, chosen among all heads of a layer or within each KV group. The
arms of one seed see the same tokens in the same order. A second call continues runs that were interrupted and repeats
none that is complete. KEY=VALUE changes the configuration of all arms.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scipy.stats import t as student
from timing import markdown

from moh_megatron.cli import CommandParser, at_least, exit_code, new_file
from moh_megatron.io.console import print_result, progress_bar
from moh_megatron.io.errors import Fault

COMMON = (
    "model.num_query_groups=2",
    "parallel.tensor=1",
    "train.micro_batch_size=16",
    "train.eval_interval=0",
    "train.eval_samples=null",
    "generate.prompts=[]",
)
_MOH = ("moh.shared_heads=2", "moh.shared_placement=spread")
_KV = "moh.routing_groups=kv"
ARMS: Mapping[str, tuple[str, ...]] = {
    "dense": ("moh.enabled=false",),
    "75 %, of the layer": (*_MOH, "moh.active_heads=75%"),
    "75 %, of each KV group": (*_MOH, "moh.active_heads=75%", _KV),
    "75 %, of each KV group, gates normalised within it": (
        *_MOH, "moh.active_heads=75%", _KV, "moh.gate_softmax=group",
    ),
    "50 %, of the layer": (*_MOH, "moh.active_heads=50%"),
    "50 %, of each KV group": (*_MOH, "moh.active_heads=50%", _KV),
    "50 %, of each KV group, gates normalised within it": (
        *_MOH, "moh.active_heads=50%", _KV, "moh.gate_softmax=group",
    ),
}  # fmt: skip
CONFIDENCE = 0.95


def _folder(root: Path, arm: str, seed: int) -> Path:
    return root / "-".join("".join(c if c.isalnum() else " " for c in arm).split()) / f"seed{seed}"


def validation_loss(folder: Path) -> float | None:
    """The last validation loss of a complete run; None for another one."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return summary["val_loss"]


def train(root: Path, arm: str, seed: int, overrides: Sequence[str]) -> float:
    """Train one arm unless it is complete, and return its validation loss."""
    folder = _folder(root, arm, seed)
    if (loss := validation_loss(folder)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        settings = [
            *COMMON,
            *ARMS[arm],
            f"run.dir={folder}",
            f"run.seed={seed}",
            f"data.dir={root / 'data'}",
            *overrides,
        ]
        command = [sys.executable, "-m", "moh_megatron.commands.pretrain", "smoke", "--nproc-per-node", "1"]
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(
                [*command, *settings],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        loss = validation_loss(folder)
        if done.returncode or loss is None:
            raise Fault(f"{folder}/log.txt: the run ended with exit code {done.returncode}; the log says why.")
    return loss


def prepare(root: Path, overrides: Sequence[str]) -> None:
    """Tokenize the text once for all arms."""
    command = [sys.executable, "-m", "moh_megatron.commands.prepare_data", "smoke"]
    done = subprocess.run([*command, *COMMON, f"run.dir={root}", f"data.dir={root / 'data'}", *overrides], check=False)
    if done.returncode:
        raise Fault(f"{root}/data: preparing the text ended with exit code {done.returncode}.")


def interval(values: Sequence[float]) -> str:
    """Mean and half the width of its confidence interval, by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def table(losses: Mapping[str, Sequence[float]]) -> str:
    """A row for each arm: its losses, and its difference to the dense model of the same seed."""
    dense = losses["dense"]
    rows = [
        (arm, interval(of_arm), interval([loss - base for loss, base in zip(of_arm, dense, strict=True)]))
        for arm, of_arm in losses.items()
    ]
    return markdown(("heads used, chosen among those", "validation loss", "minus dense, seed by seed"), rows)


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the runs are kept")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="Markdown file to write")
    parser.add_argument("--seeds", type=at_least(1), nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=at_least(1), default=2, metavar="N", help="runs at once; default: 2")
    arguments = parser.parse_args()
    root = arguments.folder.resolve()
    prepare(root, arguments.overrides)
    runs = [(arm, seed) for seed in arguments.seeds for arm in ARMS]
    with ThreadPoolExecutor(arguments.workers) as pool, progress_bar("train", len(runs), "run") as bar:

        def one(run: tuple[str, int]) -> float:
            loss = train(root, *run, arguments.overrides)
            bar.update()
            return loss

        found = dict(zip(runs, pool.map(one, runs), strict=True))
    text = table({arm: [found[arm, seed] for seed in arguments.seeds] for arm in ARMS})
    text += f"\n\nMeans over {len(arguments.seeds)} seeds with {CONFIDENCE:.0%} confidence intervals, in nats a token."
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print_result(text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
