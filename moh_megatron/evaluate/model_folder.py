"""Finds a trained model: a checkpoint, or an exported folder, with its configuration. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_import_config import import_config
from moh_megatron.config.layer_heads import choice_of_heads
from moh_megatron.config.load import load_config
from moh_megatron.config.paths import EXPORT, require_folder
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError, refuse_differences


def is_exported(folder: Path) -> bool:
    """Whether ``folder`` is a Hugging Face folder rather than one of checkpoints."""
    return (folder / "config.json").is_file()


def find_model(path: Path) -> Path:
    """The model that ``path`` names: an exported folder, a checkpoint, or the newest checkpoint of a run folder or of a
    folder of checkpoints.

    Raises UserError where there is none.
    """
    return path if is_exported(path) else layout.resolve_checkpoint(path)


def tokenizer_folder(path: Path) -> Path:
    """The folder with the tokenizer of the model that ``find_model`` found."""
    return path if is_exported(path) else layout.tokenizer_folder(path)


def training_config(path: Path, overrides: list[str]) -> Config:
    """The configuration that the model in ``path`` was trained with, for the data that it names.

    A checkpoint holds its own; an exported folder may lie in its run folder. Raises UserError where there is none, and
    where overrides ask for another choice of heads.
    """
    if (file := _config_file(path)) is not None:
        config = load_config(file, overrides)
        require_same_choice(path, config)
        return config
    raise UserError(
        f"{path}: no training configuration lies in or beside it, so its validation data are unknown. Name the "
        "configuration with --config, or leave the validation loss out with --no-validation."
    )


def require_same_choice(path: Path, config: Config) -> None:
    """Raise UserError where ``config`` lets tokens choose among other heads than the model in ``path`` was trained to.

    A model without a training configuration, and a dense one, can be compared with nothing.
    """
    if (file := _config_file(path)) is None:
        return
    trained = load_config(file)
    if not (trained.moh.enabled and config.moh.enabled):
        return
    saved, current = (choice_of_heads(origin.model, origin.moh) for origin in (trained, config))
    remedy = (
        "A model computes with the routing of its training: leave these values as they are, or train another model."
    )
    refuse_differences(f"{path} was made with other values", saved, current, remedy)


def _config_file(path: Path) -> Path | None:
    """The configuration of the training of the model in ``path``: in it, or beside an exported folder."""
    return next((file for file in (path / layout.CONFIG, path.parent / layout.CONFIG) if file.is_file()), None)


def require_model(path: Path) -> None:
    """Raise UserError where ``find_model`` would find nothing in ``path``; no large file is read."""
    if not is_exported(path):
        layout.require_checkpoints(path)


def _check_model_folder(config: Config) -> None:
    """Raise UserError unless there is a folder where moh-generate looks for a model."""
    if config.generate.load is not None:
        require_folder(Path(config.generate.load), "an exported folder, a checkpoint, or a run folder (generate.load)")
    elif not Path(config.run.dir).is_dir():
        raise UserError(
            f"{config.run.dir}: no such run folder. Train first (moh-pretrain), or set generate.load to an "
            f"exported folder or a checkpoint."
        )


def model_to_load(config: Config) -> Path:
    """generate.load, else the run's exported folder, else the run's newest checkpoint.

    Raises UserError where there is none, and where ``config`` no longer describes the run's model.
    """
    _check_model_folder(config)
    if config.generate.load is not None:
        return find_model(Path(config.generate.load))
    model = _model_of_run(Path(config.run.dir))
    require_same_choice(model, config)
    return model


def _model_of_run(run_dir: Path) -> Path:
    """The exported folder of a run, else its newest checkpoint. Raises UserError."""
    exported = run_dir / EXPORT
    return exported if is_exported(exported) else find_model(run_dir)


def config_of_folder(folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration of the model in ``folder``, a run folder, a checkpoint or an exported one, with generate.load.

    It is that of the model's training, or follows from config.json where an exported folder lies outside its run.
    Raises UserError.
    """
    if any(override.startswith("generate.load=") for override in overrides):
        raise UserError(f"generate.load must be left out where CONFIG is a folder with a model. Got both: {folder}.")
    model = folder if is_exported(folder) else _model_of_run(folder)
    if not is_exported(model) or (model.parent / layout.CONFIG).is_file():
        config = training_config(model, list(overrides))
    else:
        config = _config_from_json(model, overrides)
    return replace(config, generate=replace(config.generate, load=str(model)))


def _config_from_json(folder: Path, overrides: Sequence[str]) -> Config:
    try:
        return import_config(folder, folder, None, overrides, bf16=False)
    except UserError as error:
        other = f"Of another model name a configuration, too: moh-generate CONFIG generate.load={folder}"
        raise UserError(f"{error}\n{other}") from None
