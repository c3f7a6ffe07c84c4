"""Checks a configuration before any rank is started. Imports nothing heavy, so that errors show at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.data.prepared_data import PreparedData, load_prepared
from moh_megatron.evaluate.suite import load_suite
from moh_megatron.io.errors import UserError

_CHECK_SUITE = """
import sys
from pathlib import Path
from moh_megatron.cli import exit_code
from moh_megatron.evaluate.run import checked_suite

def main():
    checked_suite(Path(sys.argv[1]))

sys.exit(exit_code(main))
"""


def check_suite(config: Config) -> None:
    """Raise UserError where lm-eval or the data of a task is missing, or a task or metric of evaluate.suite is unknown.

    The check runs in a process of its own: the launcher would otherwise keep the imports of lm-eval in memory for the
    whole run.
    """
    suite = config.evaluate.suite
    if suite is None:
        return
    done = subprocess.run([sys.executable, "-c", _CHECK_SUITE, suite], capture_output=True, text=True, check=False)
    if done.returncode:
        (*_, last) = done.stderr.strip().splitlines() or ["it cannot be checked"]
        raise UserError(f"evaluate.suite: {last.removeprefix('error: ')}")


def check_settings(config: Config, world_size: int) -> None:
    """Raise UserError unless ``world_size`` ranks can train by this configuration, whatever its data are."""
    data_parallel_size(config, world_size)
    gradient_accumulation_steps(config, world_size)
    if config.deepspeed:
        # DeepSpeed knows its keys. Its import takes seconds, so it is done only where there are keys to check.
        from moh_megatron.train.engine import check_deepspeed_section

        check_deepspeed_section(config, world_size)
    if config.evaluate.suite is not None:
        suite = load_suite(Path(config.evaluate.suite))
        try:
            suite.check_installed()
        except UserError as error:
            raise UserError(f"evaluate.suite: {error}") from None


def preflight(config: Config, world_size: int) -> PreparedData:
    """The prepared data; raises UserError unless this configuration can train on it with ``world_size`` ranks."""
    check_settings(config, world_size)
    data = load_prepared(config)
    data.check_fits(config)
    data.tokenizer()
    return data
