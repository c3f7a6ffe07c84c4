#!/usr/bin/env python
"""The table of docs/continue_tuning.md: loss of held-out documents before and after tuning, and the share recovered.

python tools/tuning_table.py CONTROL ARM [ARM ...] --out table.md

CONTROL is the run folder of the dense model tuned on the same tokens, each ARM one of a MoH model made of the same
dense checkpoint. What is measured is kept in <run folder>/documents.json, so that a second call measures nothing twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moh_megatron.cli import at_least, exit_code, new_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("control", type=Path, metavar="CONTROL")
    parser.add_argument("arms", type=Path, nargs="*", metavar="ARM")
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="Markdown")
    parser.add_argument("--documents", type=at_least(2), metavar="N", help="at most; default: all held-out ones")
    arguments = parser.parse_args()
    from moh_megatron.upcycle.tuning import Arm, as_markdown

    control = Arm(arguments.control, arguments.documents)
    text = as_markdown(control, [Arm(each, arguments.documents) for each in arguments.arms])
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(exit_code(main))
