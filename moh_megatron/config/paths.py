"""Where a run keeps what: every path that follows from ``run.dir``; and what is said of a path that is no folder."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError


def data_dir(config: Config) -> Path:
    """The prepared dataset and its tokenizer."""
    return Path(config.data.dir) if config.data.dir is not None else Path(config.run.dir) / "data"


def checkpoint_dir(config: Config) -> Path:
    """The run's checkpoints, one folder each."""
    return Path(config.run.dir) / "checkpoints"


def hf_dir(config: Config) -> Path:
    """The exported Hugging Face folder."""
    return Path(config.run.dir) / "hf"


def refuse_checkpoint(run_dir: str) -> None:
    """Raise UserError where ``run_dir`` is or lies in a checkpoint, whose files a run would replace by its own."""
    place = Path(run_dir).resolve()
    for folder in (place, *place.parents):
        if (folder / "manifest.json").is_file() and (folder / "weights").is_dir():
            raise UserError(
                f"run.dir must lie outside every checkpoint. Got {run_dir}, and {folder} is one. Name another folder."
            )


def require_folder(path: Path, expected: str) -> None:
    """Raise UserError, which says what was ``expected``, unless ``path`` is a folder."""
    if not path.is_dir():
        raise UserError(f"{path}: {'a file' if path.exists() else 'no such folder'}. Expected {expected}.")
