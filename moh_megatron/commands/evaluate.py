"""Evaluates a model: validation loss of each source, and the tasks of suites.

moh-evaluate MODEL [section.key=value ...]                      validation loss
moh-evaluate MODEL --suite configs/eval/offline.yaml [...]      and lm-eval's tasks
moh-evaluate MODEL --suite SUITE --against OTHER/results.json   and a paired comparison

MODEL is an exported folder, a checkpoint, a folder of checkpoints or a run folder.
"""

from __future__ import annotations

import argparse
import os
import sys

from moh_megatron.cli import add_trust_option, command_parser, exit_code, path_argument
from moh_megatron.evaluate.early_checks import check_evaluation
from moh_megatron.io.console import is_quiet, slow_imports


def parse_arguments() -> argparse.Namespace:
    parser = command_parser("Validation loss and tasks of an exported folder or a checkpoint.")
    parser.add_argument("model", type=path_argument, metavar="MODEL", help="exported folder, checkpoint or run folder")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="replaces a value of the training configuration",
    )
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="training configuration; default: the model's own"
    )
    parser.add_argument("--no-validation", action="store_true", help="leave the validation loss out")
    parser.add_argument(
        "--suite", type=path_argument, metavar="FILE", help="tasks to run: a file, or a shipped suite's name"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="run only the first N questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="batch size of the tasks, default 8")
    parser.add_argument("--against", type=path_argument, metavar="DIR", help="results of another model to compare with")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="default: eval/NAME beside the model's folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto, the default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of the model")
    add_trust_option(parser)
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    check_evaluation(arguments)
    if is_quiet():
        # The libraries read these when they are imported.
        os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with slow_imports():
        from moh_megatron.evaluate.run import evaluate

    evaluate(arguments)


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
