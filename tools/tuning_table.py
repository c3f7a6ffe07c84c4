#!/usr/bin/env python
"""Writes the table of docs/continue_tuning.md: loss of held-out documents before and after tuning, share recovered.

.venv/bin/python tools/tuning_table.py CONTROL RUN [RUN ...] --out table.md

CONTROL is the run folder of the dense model tuned on the same tokens, each RUN that of a MoH model made of the same
dense checkpoint. The losses are kept in <run folder>/documents.json, so that a second call does not measure them again.
"""

from __future__ import annotations

import argparse
import sys

from moh_megatron.cli import CommandParser, at_least, exit_code, new_file, path_argument
from moh_megatron.io.console import print_result


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("control", type=path_argument, metavar="CONTROL")
    parser.add_argument("runs", type=path_argument, nargs="*", metavar="RUN")
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="Markdown file to write")
    parser.add_argument(
        "--documents", type=at_least(2), metavar="N", help="measure at most N documents; default: all held-out ones"
    )
    arguments = parser.parse_args()
    from moh_megatron.upcycle.tuned_report import TunedRun, tuning_table

    control = TunedRun(arguments.control, arguments.documents)
    text = tuning_table(control, [TunedRun(folder, arguments.documents) for folder in arguments.runs])
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print_result(text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
