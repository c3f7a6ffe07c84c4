#!/usr/bin/env python
"""Draw one picture of a run: its losses over tokens and, of a MoH model, the load of every head.

.venv/bin/python tools/plot_run.py RUN --out FILE.png

RUN is a run folder; the run may still be going on. Where summary.json holds the entropies of single tokens and of pairs
(data.ngram_baselines), both are drawn as lines to compare the losses with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moh_megatron.cli import command_parser, exit_code, path_argument, png_file
from moh_megatron.io.console import print_result
from moh_megatron.io.errors import UserError
from moh_megatron.monitor.records import read_summary
from moh_megatron.monitor.run_folder import RunFolder, is_number, open_run

_MOST_HEADS_WITH_NUMBERS = 16


def finite_points(points: Iterable[tuple[int, float | None]]) -> list[tuple[int, float]]:
    """The points whose value was measured and is finite."""
    return [(tokens, loss) for tokens, loss in points if loss is not None and math.isfinite(loss)]


def training_losses(run: RunFolder) -> list[tuple[int, float]]:
    """(tokens, loss) of each logged step."""
    return finite_points((record["tokens"], record.get("lm_loss")) for record in run.steps)


def draw_losses(axis: Axes, run: RunFolder) -> None:
    """The training loss of every step, the validation losses, and the entropies of the text, in nats a token."""
    training = training_losses(run)
    tokens_per_step = run.config.train.tokens_per_step
    validation = finite_points((record["step"] * tokens_per_step, record["loss"]) for record in run.validations)
    axis.plot(*zip(*training, strict=True), color="0.65", linewidth=1, label="training")
    if validation:
        axis.plot(*zip(*validation, strict=True), color="tab:blue", marker="o", markersize=4, label="validation")
        tokens, loss = validation[-1]
        axis.annotate(
            f"{loss:.2f}", (tokens, loss), (0, -14), textcoords="offset points", color="tab:blue", ha="center"
        )
    summary_file = run.path / "summary.json"
    summary = read_summary(summary_file) if summary_file.is_file() else {}
    for key in ("unigram_entropy", "bigram_entropy"):
        if is_number(summary.get(key)):
            draw_level(axis, key.replace("_", " "), summary[key], training)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set(xlabel="tokens", ylabel="loss, nats a token", title="loss")
    axis.margins(y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")


def draw_level(axis: Axes, name: str, loss: float, curve: list[tuple[int, float]]) -> None:
    """A horizontal line with its name where it is far from the falling ``curve``."""
    axis.axhline(loss, color="0.4", linewidth=1, linestyle="--")
    (_, first), (_, last) = curve[0], curve[-1]
    x, side, offset = (0.02, "left", -12) if abs(loss - last) < abs(loss - first) else (0.98, "right", 4)
    axis.annotate(
        f"{name}: {loss:.2f}",
        (x, loss),
        (0, offset),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="0.3",
        fontsize="small",
        ha=side,
    )


def draw_head_load(figure: Figure, axis: Axes, load: list[list[float]]) -> None:
    """``load`` [L][N]: layers down, heads across; a dark square is a head that every token used."""
    heads = len(load[0])
    columns, rows = ([number - 0.5 for number in range(count + 1)] for count in (heads, len(load)))
    image = axis.pcolormesh(columns, rows, load, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axis.invert_yaxis()
    if heads <= _MOST_HEADS_WITH_NUMBERS:
        for layer, shares in enumerate(load):
            for head, share in enumerate(shares):
                color = "white" if share > 0.6 else "black"
                axis.text(head, layer, f"{share:.0%}", color=color, fontsize="small", ha="center", va="center")
    axis.set_xticks(range(0, heads, max(1, heads // 8)))
    axis.set_yticks(range(0, len(load), max(1, len(load) // 8)))
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel="head", ylabel="layer", title="share of tokens that use a head")
    figure.colorbar(image, ax=axis, format="{x:.0%}", ticks=[0, 0.5, 1]).outline.set_visible(False)


def draw_run(run: RunFolder, path: Path) -> None:
    """Write the picture to ``path``. Raises UserError where no step has been logged yet."""
    if not training_losses(run):
        raise UserError(f"{run.path}: metrics.jsonl must hold a step with a loss. There is none yet; draw it later.")
    load = run.head_load
    columns = 2 if load else 1
    figure, axes = plt.subplots(1, columns, figsize=(4.6 * columns, 3.2), squeeze=False, layout="constrained")
    draw_losses(axes[0, 0], run)
    if load:
        draw_head_load(figure, axes[0, 1], load)
    figure.savefig(path, dpi=180)
    plt.close(figure)


def main() -> None:
    parser = command_parser("Draw the losses of a run and the load of its heads as one picture.")
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=png_file, required=True, metavar="FILE.png", help="picture to write")
    arguments = parser.parse_args()
    draw_run(open_run(arguments.run), arguments.out)
    print_result(arguments.out)


if __name__ == "__main__":
    sys.exit(exit_code(main))
