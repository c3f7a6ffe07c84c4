"""Names the files that mark a Hugging Face folder, and checks one to export into. Imports nothing slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from moh_megatron.checkpoint.layout import HF_CONFIG
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import refuse_inside, resolve_target
from moh_megatron.io.small_file import read_small_text

CONFIG = HF_CONFIG
MARKER = "moh_megatron.json"
"""The file that records the form and the files of an export, so that a later export replaces them and nothing else."""
MARKER_CONTENT = "the record of an export"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
_PICKLE_SUFFIX = ".bin"
Form = Literal["moh", "llama", "official"]


def check_replaceable(hf_dir: Path, source: Path | None = None) -> None:
    """Raise UserError unless ``hf_dir`` is absent, empty, or holds an earlier export and nothing else.

    It must not lie inside the ``source`` that is converted: a checkpoint holds only what its manifest lists.
    """
    if source is not None:
        refuse_inside(hf_dir, source)
    path = resolve_target(hf_dir)
    if not path.exists():
        return
    remedy = "Name another folder, or move this one away."
    if not path.is_dir():
        raise UserError(f"{hf_dir}: must be a folder to export into. Got a file. {remedy}")
    present = {entry.name for entry in path.iterdir()}
    if not present:
        return
    try:
        exported = {MARKER, *json.loads(read_small_text(path / MARKER))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{hf_dir}: must be empty or an earlier export. Got a folder of something else. {remedy}"
        ) from None
    if unknown := sorted(present - exported):
        raise UserError(f"{hf_dir}: holds files that are not of the earlier export: {', '.join(unknown[:5])}. {remedy}")


def check_routers(config: Config, form: Form) -> None:
    """Raise UserError if ``form`` has no place for the routers of the model."""
    if form == "llama" and config.moh.enabled:
        raise UserError(
            "--format llama needs a dense model: LlamaForCausalLM has no routers, and would use every head. "
            "Got moh.enabled: true; use --format moh."
        )


def weights_file(folder: Path) -> Path:
    """The file with all weights of ``folder``, or the index of their files. Raises UserError where there is neither."""
    for name in (SAFETENSORS, PICKLE):
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return path
    hint = ""
    if (folder / "config.yaml").is_file():
        exported = (folder / "hf" / CONFIG).is_file()
        remedy = f"its export is {folder / 'hf'}" if exported else "moh-convert megatron-to-hf exports it"
        hint = f" Got a run or a checkpoint: {remedy}."
    raise UserError(
        f"{folder}: holds no weights. Expected {SAFETENSORS}, or {SAFETENSORS}.index.json and its files.{hint}"
    )


def refuse_pickle(path: Path, allow_pickle: bool) -> bool:
    """Whether ``path`` is a file of torch.save. Raises UserError where it is one and must not be read."""
    pickled = path.suffix == _PICKLE_SUFFIX
    if pickled and not allow_pickle:
        raise UserError(
            f"{path}: the weights are pickles, which can run code when they are read. Convert them to "
            "safetensors, or add --allow-pickle to read them as tensors only."
        )
    return pickled
