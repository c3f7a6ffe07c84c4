"""Write one HTML page about runs: moh-report RUN [RUN ...] [--out report.html]."""

from __future__ import annotations

import argparse
import sys

from moh_megatron.cli import command_parser, exit_code, path_argument
from moh_megatron.io.console import print_result, slow_imports
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import check_writable


def parse_arguments() -> argparse.Namespace:
    parser = command_parser("Write one self-contained HTML page about runs.")
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="default: report.html in the first run folder"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with slow_imports("loading TensorBoard"):
        from moh_megatron.monitor.run_folder import open_run
        from moh_megatron.run_report import page

    runs = [open_run(path) for path in arguments.runs]
    names = [run.name for run in runs]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"Run folders must differ in their names. Got {', '.join(sorted(repeated))} twice.")
    out = arguments.out or arguments.runs[0] / "report.html"
    if out.is_dir():
        raise UserError(f"--out: {out} must be a file. Got a folder; name one in it, such as {out / 'report.html'}.")
    check_writable(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    # A record can hold half a character, which UTF-8 cannot.
    temporary.write_text(page(runs), encoding="utf-8", errors="backslashreplace")
    temporary.replace(out)
    print_result(out)


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
