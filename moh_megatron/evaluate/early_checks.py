"""Checks what moh-evaluate is asked for, before torch, Transformers or lm-eval is imported."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from moh_megatron.config.load import load_config
from moh_megatron.config.paths import require_folder
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.evaluate.model_folder import is_exported, require_model, training_config
from moh_megatron.evaluate.paired_test import read_questions
from moh_megatron.evaluate.suite import load_suite
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import check_writable


def check_evaluation(arguments: Namespace) -> None:
    """Raise UserError for ``arguments`` of moh-evaluate that contradict each other or name what is not there."""
    given: Path | None = arguments.config
    if arguments.no_validation and (arguments.overrides or given):
        raise UserError("--no-validation leaves nothing for a configuration to say. Got one, or overrides; drop them.")
    if arguments.no_validation and arguments.suite is None:
        raise UserError("--no-validation without --suite leaves nothing to measure. Drop the one or name the other.")
    if arguments.suite is None and arguments.against is not None:
        raise UserError("--against compares answers to tasks, and needs --suite.")
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")
    require_folder(arguments.model, "an exported folder, a checkpoint, a folder of checkpoints, or a run folder")
    if given is not None:
        config = load_config(given, arguments.overrides)
        load_prepared(config).check_fits(config)
    if arguments.suite is not None:
        load_suite(arguments.suite).check_installed()
    if arguments.against is not None:
        read_questions(arguments.against)
    if arguments.out is not None:
        check_writable(arguments.out)
    require_model(arguments.model)
    if given is None and not arguments.no_validation and is_exported(arguments.model):
        config = training_config(arguments.model, arguments.overrides)
        load_prepared(config).check_fits(config)
