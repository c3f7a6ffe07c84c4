#!/usr/bin/env python
"""Checks the arguments and inputs of a job with one process; the job scripts call it before they submit the job.

.venv/bin/python slurm/check_process.py [--no-data | --report] pipelines/convert.py ARGUMENTS

With --no-data it checks only the arguments, because the files they name are not on this machine. With --report it warns
of files that it would refuse otherwise, for a dry run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from moh_megatron.cli import exit_code, path_argument
from moh_megatron.config.examples import find_config, find_suite
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError

logger = logging.getLogger("moh_megatron.slurm.check_process")

INPUTS: dict[str, Callable[[Path], Path]] = {"model": Path, "config": find_config, "suite": find_suite, "against": Path}
"""Arguments of convert.py and evaluate.py that name inputs, besides the folder of a conversion; how each is found."""


def _inputs(arguments: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Yield the argument and the path of each input of the pipeline."""
    source = "hf_dir" if getattr(arguments, "command", None) == "hf-to-megatron" else "load_dir"
    for name in (*INPUTS, source):
        if (path := getattr(arguments, name, None)) is not None:
            yield ("MODEL" if name == "model" else f"--{name.replace('_', '-')}"), INPUTS.get(name, Path)(path)


def check_inputs(arguments: argparse.Namespace) -> None:
    """Raise UserError where an input of convert.py or evaluate.py does not exist."""
    for name, path in _inputs(arguments):
        if not path.exists():
            raise UserError(f"{name}: {path} is not there. Set MOH_NO_DATA_HERE=1 if the nodes have it.")


def check_data(arguments: argparse.Namespace, config: Config, no_data: bool) -> None:
    """Raise UserError where the inputs or the tokenizer of a dataset do not exist."""
    from moh_megatron.data.prepare.inputs import HUB, find_inputs
    from moh_megatron.data.prepare.make_tokenizer import given_tokenizer
    from moh_megatron.data.prepare.pipeline import shard_tokenizer
    from moh_megatron.data.source_configs import source_configs

    for _, source in source_configs(config, arguments.source):
        if source.data.shard is not None and (not no_data or source.tokenizer.path is None):
            shard_tokenizer(source)
        # The job itself checks inputs on the Hub.
        local = [name for name in source.data.inputs if not name.startswith(HUB)]
        if not no_data and (local or not source.data.inputs):
            find_inputs(local)
            given_tokenizer(source)


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the arguments and inputs of a job with one process.")
    parser.add_argument("--no-data", action="store_true", help="the inputs are not on this machine")
    parser.add_argument("--report", action="store_true", help="warn of inputs that would be refused")
    parser.add_argument("pipeline", type=path_argument, metavar="PIPELINE", help="such as pipelines/convert.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENTS", help="its arguments")
    own = parser.parse_args()
    sys.argv = [str(own.pipeline), *own.arguments]
    try:
        parsed = import_module(f"moh_megatron.commands.{own.pipeline.stem}").parse_arguments()
    except SystemExit as left:
        # Only the help or the configuration was requested: submit nothing.
        sys.exit(left.code or 1)
    if own.pipeline.name == "prepare_data.py":
        check_data(*parsed, no_data=True)
    if own.no_data:
        return
    try:
        if own.pipeline.name == "prepare_data.py":
            check_data(*parsed, no_data=False)
        else:
            check_inputs(parsed)
    except UserError as error:
        if not own.report:
            raise
        logger.warning(f"{error} Without --dry-run this is refused; what depends on it was not checked.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
