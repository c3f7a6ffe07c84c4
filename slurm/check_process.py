#!/usr/bin/env python
"""Check what a job of one process is about to read; the job scripts call this, typed, before anything is submitted.

python slurm/check_process.py [--no-data] pipelines/convert.py ARGUMENTS

With --no-data only the arguments are checked: what they name is not on this machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from moh_megatron.cli import exit_code
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError

READ = ("model", "config", "suite", "against")
"""Arguments of convert.py and evaluate.py that name what is read, besides the folder of a conversion."""


def _read(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Names and paths of what the pipeline will read."""
    converted = "hf_dir" if getattr(arguments, "command", None) == "hf-to-megatron" else "load_dir"
    for name in (*READ, converted):
        if (path := getattr(arguments, name, None)) is not None:
            yield ("MODEL" if name == "model" else f"--{name.replace('_', '-')}"), path


def check_data(arguments: argparse.Namespace, config: Config, no_data: bool) -> None:
    """Raise UserError where the inputs or the tokenizer of a dataset are not there."""
    from moh_megatron.data.prepare.inputs import HUB, find_inputs
    from moh_megatron.data.prepare.make_tokenizer import given_tokenizer
    from moh_megatron.data.prepare.pipeline import shard_tokenizer
    from moh_megatron.data.source_configs import source_configs

    for _, each in source_configs(config, arguments.source):
        if each.data.shard is not None and (not no_data or each.tokenizer.path is None):
            shard_tokenizer(each)
        # What lies on the Hub is asked for by the job.
        here = [name for name in each.data.inputs if not name.startswith(HUB)]
        if not no_data and (here or not each.data.inputs):
            find_inputs(here)
            given_tokenizer(each)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check what a job of one process is about to read.")
    parser.add_argument("--no-data", action="store_true", help="what the arguments name is not on this machine")
    parser.add_argument("pipeline", type=Path, metavar="PIPELINE", help="such as pipelines/convert.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="its own")
    own = parser.parse_args()
    sys.argv = [str(own.pipeline), *own.arguments]
    try:
        parsed = import_module(f"moh_megatron.commands.{own.pipeline.stem}").parse_arguments()
    except SystemExit as left:
        # Only help, or the configuration, was asked for: nothing is to be submitted.
        sys.exit(left.code or 1)
    if own.pipeline.name == "prepare_data.py":
        arguments, config = parsed
        check_data(arguments, config, own.no_data)
    elif not own.no_data:
        for name, path in _read(parsed):
            if not path.exists():
                raise UserError(f"{name}: {path} is not there. Set MOH_NO_DATA_HERE=1 if the nodes have it.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
