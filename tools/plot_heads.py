#!/usr/bin/env python
"""Draws the head load by layer and text and the similarity of the heads' outputs, as pictures and tables.

.venv/bin/python tools/plot_heads.py RUN_OR_MODEL --texts novels=configs/data/austen.jsonl.gz code=FILE [--out DIR]

RUN_OR_MODEL is an exported folder, a checkpoint, a folder of checkpoints or a run folder. A text is any file that
moh-prepare reads. The tool writes head_load.png and .csv (every layer; the paper shows the last), and
head_similarity.png and .csv: the mean cosine of two heads' outputs over the tokens that used both.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from moh_megatron.cli import CommandParser, exit_code, path_argument
from moh_megatron.evaluate.head_usage import HeadUsage, measure_head_usage, read_text
from moh_megatron.evaluate.loaded_model import load_model
from moh_megatron.evaluate.model_folder import find_model
from moh_megatron.evaluate.run import default_folder
from moh_megatron.io.console import print_result, progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import check_writable

_CHARACTERS_A_TOKEN = 16
"""Characters that are read for each token; a tokenizer needs fewer."""
_COLUMNS = 6


def named_texts(arguments: Sequence[str]) -> dict[str, str]:
    """{name: path} of arguments NAME=PATH. Raises UserError."""
    texts = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise UserError(f"--texts: '{argument}': must have the form NAME=FILE.")
        if name in texts:
            raise UserError(f"--texts: '{name}' stands twice. Give each text a name of its own.")
        texts[name] = path
    return texts


def draw_load(usages: dict[str, HeadUsage], title: str, path: Path) -> None:
    """Draw one map for each text: layers down, heads across; black means that every token used the head."""
    layers, heads = next(iter(usages.values())).load.shape
    columns = min(len(usages), 3)
    rows = math.ceil(len(usages) / columns)
    size = (max(3.5, 0.28 * heads + 1.2) * columns, max(2.2, 0.24 * layers + 1.2) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis, (name, usage) in zip(axes.flat, usages.items(), strict=False):
        image = axis.imshow(usage.load, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(f"{name}, {usage.tokens:,} tokens", parse_math=False)
        axis.set(xlabel="head", ylabel="layer")
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        axis.set_yticks(range(0, layers, max(1, layers // 8)))
    for axis in axes.flat[len(usages) :]:
        axis.axis("off")
    assert image is not None
    figure.colorbar(image, ax=axes, label="share of tokens that used the head")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def draw_similarity(mean: torch.Tensor, title: str, path: Path) -> None:
    """Draw ``mean`` [L, N, N] as one square for each layer."""
    columns = min(_COLUMNS, len(mean))
    rows = math.ceil(len(mean) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.1 * columns + 1, 2.2 * rows + 0.5), squeeze=False, layout="constrained"
    )
    image = None
    for layer, axis in enumerate(axes.flat):
        if layer >= len(mean):
            axis.axis("off")
            continue
        image = axis.imshow(mean[layer], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(f"layer {layer}", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    assert image is not None
    figure.colorbar(image, ax=axes, label="cosine of outputs")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(head)
        writer.writerows(rows)
    temporary.replace(path)


def write_tables(usages: dict[str, HeadUsage], folder: Path) -> None:
    """Write head_load.csv and head_similarity.csv."""
    write_csv(
        folder / "head_load.csv",
        ("text", "layer", "head", "load"),
        (
            (name, layer, head, f"{load:.6f}")
            for name, usage in usages.items()
            for layer, loads in enumerate(usage.load.tolist())
            for head, load in enumerate(loads)
        ),
    )
    write_csv(
        folder / "head_similarity.csv",
        ("text", "layer", "head", "other", "cosine"),
        (
            (name, layer, head, other, "" if math.isnan(cosine) else f"{cosine:.6f}")
            for name, usage in usages.items()
            for layer, square in enumerate(usage.similarity.tolist())
            for head, row in enumerate(square)
            for other, cosine in enumerate(row)
            if other > head
        ),
    )


def main() -> None:
    parser = CommandParser(description="Head load by layer and text, similarity of head outputs.")
    parser.add_argument("model", type=path_argument, metavar="RUN_OR_MODEL")
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="default: eval/NAME beside the model")
    parser.add_argument("--length", type=int, default=256, metavar="S", help="tokens of a sequence, default 256")
    parser.add_argument("--sequences", type=int, default=16, metavar="N", help="sequences of each text, default 16")
    arguments = parser.parse_args()
    texts = named_texts(arguments.texts)
    for name in ("length", "sequences"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1. Got {getattr(arguments, name)}.")
    path = find_model(arguments.model)
    folder = arguments.out or default_folder(path)
    check_writable(folder)
    contents: dict[str, str] = {}
    for name, file in texts.items():
        try:
            contents[name] = read_text(file, _CHARACTERS_A_TOKEN * arguments.length * arguments.sequences)
        except UserError as error:
            raise UserError(f"--texts {name}: {str(error).removeprefix('data.inputs: ')}") from None
    loaded = load_model(path, torch.device("cpu"))
    usages: dict[str, HeadUsage] = {}
    with progress_bar("texts", len(contents), "text") as bar:
        for name, text in contents.items():
            try:
                usages[name] = measure_head_usage(loaded, text, arguments.length, arguments.sequences)
            except UserError as error:
                raise UserError(f"{texts[name]}: {error}") from None
            bar.update()
    folder.mkdir(parents=True, exist_ok=True)
    draw_load(usages, f"head load, {path}", folder / "head_load.png")
    mean = torch.stack([usage.similarity for usage in usages.values()]).nanmean(0)
    draw_similarity(mean, f"similarity of head outputs, {path}", folder / "head_similarity.png")
    write_tables(usages, folder)
    for name in ("head_load.png", "head_load.csv", "head_similarity.png", "head_similarity.csv"):
        print_result(folder / name)


if __name__ == "__main__":
    sys.exit(exit_code(main))
