"""One evaluation from start to end: load, measure, write results.json and results.md."""

from __future__ import annotations

from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moh_megatron.config.errors import UserError
from moh_megatron.config.load import load_config
from moh_megatron.evaluate.results import write_results
from moh_megatron.evaluate.subject import find_model, open_subject, training_config
from moh_megatron.evaluate.validation import validation_loss


def evaluate(arguments: Namespace) -> None:
    """What ``pipelines/evaluate.py`` does with its arguments. Raises UserError."""
    path = find_model(arguments.model)
    config = None
    if not arguments.no_validation:
        given = arguments.config
        config = load_config(given, arguments.overrides) if given else training_config(path, arguments.overrides)
    elif arguments.overrides or arguments.config:
        raise UserError("--no-validation leaves nothing for a configuration to say. Got one, or overrides; drop them.")
    subject = open_subject(path, _device(arguments.device), arguments.dtype)
    found: dict[str, Any] = {"model": subject.described(), "dtype": arguments.dtype, "software": _software()}
    if config is not None:
        found["validation"] = validation_loss(subject, config)
    folder = arguments.out or default_folder(path)
    print(write_results(folder, found))
    print(f"results: {folder / 'results.json'}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must be cpu, cuda or auto, and be there. Got {name!r}: {error}") from None
    return device


def _software() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def default_folder(path: Path) -> Path:
    """Where results go that nobody gave a place: ``eval/NAME`` beside the model, or beside its checkpoints."""
    parent = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return parent / "eval" / path.name
