"""The paths that follow from ``run.dir``, and checks of folders that a user names."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import resolved

EXPORT = "hf"
"""The name of the exported folder in a run folder."""


def data_dir(config: Config) -> Path:
    """The folder of the prepared dataset and its tokenizer."""
    return Path(config.data.dir) if config.data.dir is not None else Path(config.run.dir) / "data"


def checkpoint_dir(config: Config) -> Path:
    """The folder of the run's checkpoints, each a folder of its own."""
    return Path(config.run.dir) / "checkpoints"


def refuse_checkpoint(run_dir: str) -> None:
    """Raise UserError if ``run_dir`` is or lies in a checkpoint, whose files the run would replace."""
    path = resolved(Path(run_dir))
    for folder in (path, *path.parents):
        if (folder / "manifest.json").is_file() and (folder / "weights").is_dir():
            raise UserError(
                f"run.dir must lie outside every checkpoint. Got {run_dir}, and {folder} is one. Name another folder."
            )


def require_folder(path: Path, expected: str) -> None:
    """Raise UserError, with what was ``expected``, unless ``path`` is a folder."""
    if not path.is_dir():
        raise UserError(f"{path}: {'a file' if path.exists() else 'no such folder'}. Expected {expected}.")
