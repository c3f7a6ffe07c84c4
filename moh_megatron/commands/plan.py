"""Plans a run before it is queued: memory of a rank, head balance, operations, communication, steps.

moh-plan llm_b_moh75 --world-size 64 --gpu-memory 80 parallel.tensor=2

It needs neither a GPU nor torch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

from moh_megatron.cli import at_least, config_parser, exit_code, parse_config
from moh_megatron.io.console import print_result
from moh_megatron.plan.advice import remedies
from moh_megatron.plan.plan_report import GIB, Fit, as_mapping, as_text
from moh_megatron.plan.run_plan import make_plan


def gibibytes(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, such as 80. Got {text}")
    return number


def main() -> None:
    parser = config_parser("Plan a run: memory of a rank, head balance, operations, communication.")
    parser.add_argument(
        "--world-size", type=at_least(1), required=True, metavar="N", help="the number of ranks on all nodes"
    )
    parser.add_argument(
        "--gpu-memory", type=gibibytes, metavar="GiB", help="memory of one GPU: say whether the run fits"
    )
    parser.add_argument("--json", action="store_true", help="print every number as JSON, in bytes and operations")
    arguments, config = parse_config(parser)
    plan, fit = make_plan(config, arguments.world_size), None
    if arguments.gpu_memory is not None:
        memory = int(arguments.gpu_memory * GIB)
        fits = plan.device_bytes <= memory
        fit = Fit(memory, plan.device_bytes, () if fits else tuple(remedies(config, arguments.world_size)))
    if arguments.json:
        print_result(json.dumps(as_mapping(plan, fit), indent=2))
    else:
        print_result(as_text(config, plan, fit))


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
