"""Finds the checkpoint that continue-tuning starts from, and checks it against the model. Imports nothing slow."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.checkpoint import layout
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.io.console import errors_only
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import refuse_unless_new
from moh_megatron.train.resume import ROUTER_KEYS, require_same_weights
from moh_megatron.upcycle import provenance

_MAY_DIFFER = ("model.vocab_size", "model.vocab_padding", "moh.enabled")


def initial_checkpoint_folder(config: Config) -> Path:
    """The folder of the checkpoint that ``prepare`` writes."""
    return Path(config.run.dir) / "start"


def check_tuning(config: Config, *, trains: bool) -> None:
    """Raise UserError for mistakes in ``config`` that can be seen before torch is imported and weights are read.

    ``trains`` says whether the training follows, which needs the data in any case.
    """
    if config.distillation.teacher is not None:
        layout.require_checkpoints(Path(config.distillation.teacher))
    folder = initial_checkpoint_folder(config)
    changes = False
    if not provenance.exists(folder):
        newest = layout.require_checkpoints(_stated_source(config))[0]
        source_config = layout.read_config_if_sound(newest)  # A damaged one is passed over later, and named.
        changes = source_config is not None and not needs_no_change(source_config, config)
        with errors_only():  # The preparation and the training show the same warnings.
            if source_config is not None and changes:
                refuse_unless_new(folder, "name another run.dir")
                check_source(newest, source_config, config)
            elif source_config is not None and not layout.step_folders(checkpoint_dir(config)):
                require_same_weights(newest, config)
    if changes or trains:
        load_prepared(config).check_fits(config)


def find_source(config: Config) -> Path:
    """The complete checkpoint that train.init_from names. Raises UserError."""
    return layout.resolve_checkpoint(_stated_source(config))


def _stated_source(config: Config) -> Path:
    if config.train.init_from is None:
        raise UserError("train.init_from must name the checkpoint to tune. Got null; see moh-convert.")
    return Path(config.train.init_from)


def needs_no_change(source_config: Config, config: Config) -> bool:
    """Whether training can load the source checkpoint itself, or refuses it with a message of its own."""
    becomes_moh = config.moh.enabled and not source_config.moh.enabled
    return not becomes_moh and source_config.model.tokens == config.model.tokens


def check_source(source: Path, source_config: Config, config: Config) -> None:
    """Raise UserError where no model of ``config`` can be made of the checkpoint ``source``."""
    may_differ = _MAY_DIFFER if source_config.moh.enabled else _MAY_DIFFER + ROUTER_KEYS
    require_same_weights(source, config, apart_from=may_differ)
    if source_config.moh.enabled and not config.moh.enabled:
        raise UserError(f"{source}: must be a dense model, because moh.enabled is false. Got a MoH model.")
    if not source_config.moh.enabled:
        check_gates(config)
    if source_config.model.tokens > config.model.tokens:
        raise UserError(
            f"model.vocab_size must hold the {source_config.model.tokens} entries of {source}. "
            f"Got {config.model.tokens}."
        )
    if provenance.is_measured(config) and source_config.model.tokens < config.model.tokens:
        raise UserError(
            f"moh.shared_placement: calibrated measures {source}, which knows {source_config.model.tokens} tokens. Got "
            f"model.vocab_size {config.model.tokens}: let the vocabulary grow in an earlier run, or share other heads."
        )


def check_gates(config: Config) -> None:
    """Raise UserError where ``config`` gives a dense model routers whose gates cannot all be 1."""
    moh = config.moh
    if moh.enabled and moh.router == "learned" and moh.gating != "normalized":
        raise UserError(
            f"moh.gating must be normalized to give a dense model learned routers: only its gates can all be 1, so "
            f"that the heads count as before. Got {moh.gating}."
        )
