"""Checks what moh-convert is asked for, before torch or Transformers is imported and before a checkpoint is hashed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_folder import Form, check_replaceable, check_routers, refuse_pickle, weights_file
from moh_megatron.checkpoint.hf.hf_import_config import check_target, import_config, refuse_official, require_official
from moh_megatron.config.paths import require_folder
from moh_megatron.io.console import errors_only


def check_export(load_dir: Path, hf_dir: Path, form: Form) -> None:
    """Raise UserError where no export of a checkpoint in ``load_dir`` can be written to ``hf_dir``."""
    newest = layout.require_checkpoints(load_dir)[0]
    check_replaceable(hf_dir, newest)
    if config := layout.read_config_if_sound(newest):  # A damaged checkpoint is passed over later, and named.
        check_routers(config, form)


def check_import(
    hf_dir: Path, save_dir: Path, path: Path | None, overrides: Sequence[str], *, allow_pickle: bool
) -> None:
    """Raise UserError where the model of ``hf_dir`` cannot become a checkpoint with this configuration."""
    check_target(save_dir, hf_dir)
    reader = _open(hf_dir, allow_pickle)
    refuse_official(reader, hf_dir)
    with errors_only():  # The import shows the same warnings.
        import_config(hf_dir, save_dir, path, overrides, bf16=False)


def check_official(official_dir: Path, hf_dir: Path, *, allow_pickle: bool) -> None:
    """Raise UserError where ``official_dir`` does not hold SkyworkAI's form, or ``hf_dir`` cannot be written to."""
    check_replaceable(hf_dir, official_dir)
    require_official(_open(official_dir, allow_pickle), official_dir)


def _open(hf_dir: Path, allow_pickle: bool) -> HFConfigReader:
    require_folder(hf_dir, "the folder of a Hugging Face model")
    refuse_pickle(weights_file(hf_dir), allow_pickle)
    return HFConfigReader(hf_dir)
