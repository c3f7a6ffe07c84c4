#!/usr/bin/env python
"""Reports what upcycling costs before any tuning: loss and KL against the dense model at 100, 90, 75 and 50 % heads.

.venv/bin/python tools/upcycle_report.py CONFIG.yaml --out DIR [--choices first spread calibrated] [--documents 100]

CONFIG is of a MoH model and names the dense checkpoint in train.init_from. Heads are chosen among all of a layer
(global) and, where the numbers divide evenly, in each KV group (grouped). The tool writes DIR/report.md, report.json
and report.png (which needs matplotlib), and DIR/calibration.json for calibrated heads, unless it exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moh_megatron.cli import at_least, config_parser, exit_code, parse_config
from moh_megatron.io.console import print_result

_CHOICES = ("first", "spread", "calibrated", "list")


def choice(text: str) -> str:
    """One of ``_CHOICES``."""
    if text not in _CHOICES:
        hint = ": section.key=value stands before --choices" if "=" in text else ""
        raise argparse.ArgumentTypeError(f"must be {', '.join(_CHOICES[:-1])} or {_CHOICES[-1]}. Got {text}{hint}")
    return text


def share(text: str) -> int:
    """A share of the heads in whole per cent."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"must be a whole number of per cent from 1 to 100. Got {text}")
    return int(text)


def folder(text: str) -> Path:
    """A folder to write into, which need not exist."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder to write into. Got a file: {text}")
    return Path(text)


def main() -> None:
    parser = config_parser("Compare choices of shared heads without training.")
    parser.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--choices",
        nargs="+",
        type=choice,
        metavar="CHOICE",
        help="choices of shared heads: first, spread, calibrated, or list, which are the heads that the configuration "
        "lists; default: the first three, spread only where it can be",
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        type=share,
        metavar="PERCENT",
        help="shares of active heads; default: 100 90 75 50 and the configured one",
    )
    parser.add_argument("--documents", type=at_least(2), default=100, metavar="N", help="validation documents, at most")
    arguments, config = parse_config(parser)
    from moh_megatron.checkpoint import layout
    from moh_megatron.data.prepared_data import load_prepared
    from moh_megatron.io.errors import UserError
    from moh_megatron.io.json_file import write_json
    from moh_megatron.model.single import build_single_process
    from moh_megatron.parallel import groups
    from moh_megatron.train.resume import check_same_tokenizer
    from moh_megatron.upcycle.held_out import held_out_documents
    from moh_megatron.upcycle.initial_checkpoint import read_or_measure_calibration
    from moh_megatron.upcycle.source import check_source
    from moh_megatron.upcycle.untuned_report import (
        PLACEMENTS,
        as_mapping,
        as_markdown,
        compare_choices,
        compared_shares,
        omissions,
        plan_comparison,
        possible_choices,
    )

    if config.train.init_from is None:
        raise UserError("train.init_from must name the dense checkpoint. Got null.")
    if find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib for its picture. Got none; pip install matplotlib.")
    choices = arguments.choices or (possible_choices(config) if config.moh.shared_heads == 0 else PLACEMENTS)
    shares = arguments.shares or (compared_shares(config) if config.moh.enabled else ())
    plan = plan_comparison(config, arguments.choices or possible_choices(config), shares)
    documents = held_out_documents(config, arguments.documents)
    source = layout.resolve_checkpoint(config.train.init_from)
    source_config = layout.read_config(source)
    if source_config.moh.enabled:
        raise UserError(f"train.init_from must name a dense checkpoint. Got {source}, with moh.enabled: true.")
    check_source(source, source_config, config)
    if source_config.model.tokens != config.model.tokens:
        raise UserError(
            f"model.vocab_size must be the {source_config.model.tokens} of {source}: what new rows do shows after "
            f"training. Got {config.model.tokens}."
        )
    data = load_prepared(config)
    data.check_fits(config)
    tokenizer = data.tokenizer()
    check_same_tokenizer(source, tokenizer)
    dense = build_single_process(source_config, layout.read_weights(source)).to(groups.device(0))
    arguments.out.mkdir(parents=True, exist_ok=True)
    calibration = None
    if any(variant.moh.shared_placement == "calibrated" for variant in plan.values()):
        file = arguments.out / "calibration.json"
        calibration = read_or_measure_calibration(config, source, source_config, dense, tokenizer, file)
    loss, rows = compare_choices(plan, dense, documents, calibration)
    write_json(arguments.out / "report.json", {"documents": len(documents), **as_mapping(loss, rows)})
    text = f"{source}, {len(documents)} documents; ± is the standard error over them.\n\n{as_markdown(loss, rows)}\n"
    text += "".join(f"\n{sentence}\n" for sentence in omissions(config, plan, choices, shares))
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    print_result(text)
    _draw(arguments.out / "report.png", dataclasses.asdict(loss)["value"], rows)


def _draw(picture: Path, dense: float, rows: list) -> None:  # type: ignore[type-arg]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.axhline(dense, color="black", linestyle="--", label="dense")
    for scope, choice in dict.fromkeys((row.scope, row.choice) for row in rows):
        chosen = [row for row in rows if (row.scope, row.choice) == (scope, choice)]
        style: dict[str, Any] = {"marker": "o", "label": choice}
        if scope == "grouped":
            style = {"marker": "s", "linestyle": ":", "label": f"{choice}, in KV groups"}
        left.errorbar(
            [row.share for row in chosen],
            [row.loss.value for row in chosen],
            [row.loss.error for row in chosen],
            **style,
        )
        # At 100 % the KL divergence is zero, which a logarithmic axis cannot show.
        below_all = [row for row in chosen if row.share < 100]
        right.errorbar(
            [row.share for row in below_all],
            [row.divergence.value for row in below_all],
            [row.divergence.error for row in below_all],
            **style,
        )
    left.set(xlabel="active heads, %", ylabel="loss, nats a token")
    right.set(xlabel="active heads, %", ylabel="KL from the dense model, nats a token", yscale="log")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    sys.exit(exit_code(main))
