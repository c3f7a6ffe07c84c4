#!/usr/bin/env python
"""Checks the results of a finished smoke run: .venv/bin/python tools/check_smoke.py runs/smoke"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moh_megatron.cli import CommandParser, exit_code, path_argument
from moh_megatron.config.paths import require_folder
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json

TAGS = {
    "scalars": ("loss/lm", "loss/z", "time/forward", "throughput/tflops_executed", "routing_entropy/layer_03"),
    "images": ("routing_load/layers_by_heads",),
    "histograms": ("routing_load/over_fair_load",),
    "tensors": ("config/text_summary", "version/text_summary", "sample/text_summary"),
}
"""Some of the tags that TensorBoard must have, by kind."""
MARGIN_NATS = 1.2
LOGIT_LIMIT = 1e-4
TOKENS = 1_000_000


def failures(run: Path) -> list[str]:
    """The requirements that the run folder does not meet, each as a message.

    Raises UserError if the folder holds no finished run.
    """
    require_folder(run, "the folder of a finished smoke run, such as runs/smoke")
    summary = read_json(run / "summary.json", "the summary of a finished run")
    ending = read_json(run / "exit.json", "the end of a run")
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file. Expected the steps of a finished run; train it first.")
    steps = [json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    bound = summary["unigram_entropy"] - MARGIN_NATS
    requirements = {
        f"val_loss {summary['val_loss']:.3f} must be below unigram_entropy - {MARGIN_NATS} = {bound:.3f}": (
            summary["val_loss"] < bound
        ),
        f"hf_max_logit_diff {summary['hf_max_logit_diff']} must be below {LOGIT_LIMIT}": (
            summary["hf_max_logit_diff"] < LOGIT_LIMIT
        ),
        f"tokens {summary['tokens']} must be at least {TOKENS}": summary["tokens"] >= TOKENS,
        f"exit.json must hold code 0. It holds {ending['code']}": ending["code"] == 0,
        "metrics.jsonl must hold one line for each step, in order": steps == list(range(1, summary["steps"] + 1)),
        "sample_text must not be empty": bool(summary["sample_text"].strip()),
        "hf/ must hold safetensors": any((run / "hf").glob("*.safetensors")),
        "the run folder must hold event files": any(run.glob("events.*")),
    }
    events = EventAccumulator(str(run))
    events.Reload()
    for kind, tags in TAGS.items():
        shown = events.Tags()[kind]
        requirements |= {f"TensorBoard must show {tag} among its {kind}": tag in shown for tag in tags}
    return [requirement for requirement, met in requirements.items() if not met]


def main() -> int:
    parser = CommandParser(description="Check the results of a finished smoke run.")
    parser.add_argument("run", type=path_argument, metavar="RUN", help="the run folder, such as runs/smoke")
    messages = failures(parser.parse_args().run)
    for message in messages:
        print(f"error: {message}", file=sys.stderr)
    print("smoke run: " + ("some requirements are not met" if messages else "all requirements are met"))
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
