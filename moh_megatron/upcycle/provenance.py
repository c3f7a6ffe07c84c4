"""What a start was made of and asked to be: kept beside its weights, so that no other run takes it for its own."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

from moh_megatron.checkpoint.layout import step_folders
from moh_megatron.checkpoint.manifest import read_manifest
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import refuse_differences
from moh_megatron.io.json_file import read_json, write_json

logger = logging.getLogger(__name__)

SOURCE, WEIGHTS, DATA = "train.init_from", "weights", "data"
_FILE = "asked.json"


def is_made(start: Path) -> bool:
    """Whether the folder ``start`` holds what ``write`` wrote, and so the checkpoint too."""
    return (start / _FILE).is_file()


def write(folder: Path, config: Config, weights: str, data: str) -> None:
    """Keep in ``folder`` what ``config`` asks for, and the hashes of the weights and the data it is made of."""
    write_json(folder / _FILE, {**_asked(config), WEIGHTS: weights[:12], DATA: data[:12]})


def require_same(start: Path, config: Config, data: str | None = None) -> None:
    """Raise UserError where ``config`` asks for another start than the one in the folder ``start``.

    ``data`` is the hash of the prepared data, for heads that are measured: on other data they are others.
    """
    there, here = _asked_once(start), _asked(config)
    if _same_place(there.get(SOURCE), config.train.init_from):
        there[SOURCE] = here[SOURCE]
    if data is not None:
        here[DATA] = data[:12]
    remedy = "Name the same, or another run.dir, or delete the folder to make it again."
    refuse_differences(f"{start} was made with other values", there, here, remedy)


def warn_of_other_weights(start: Path, config: Config) -> None:
    """Warn where the checkpoint that ``start`` was made of is another one by now.

    Where a run folder is named, it may have gone on; and what was named may be gone.
    """
    source = Path(config.train.init_from or "")
    now = _weights_of(source)
    if now is None:
        return
    if now != (then := _asked_once(start).get(WEIGHTS)):
        logger.warning(
            f"warning: {source} holds other weights, {now}, than {start} was made of, {then}. Delete that folder, or "
            "name another run.dir, to start from them."
        )


def _weights_of(source: Path) -> str | None:
    """As ``write`` keeps them: of a checkpoint, or of the newest one of a run, files unread."""
    for folder in (source, *step_folders(source), *step_folders(source / "checkpoints")):
        with suppress(ValueError):
            return read_manifest(folder).weights_sha256[:12]
    return None


def is_measured(config: Config) -> bool:
    """Whether the shared heads of ``config`` are those that were measured to matter."""
    return config.moh.enabled and config.moh.shared_placement == "calibrated"


def measured_with(config: Config) -> dict[str, Any]:
    """What a calibration follows from, beside weights and data."""
    return {
        "moh.calibration_sequences": config.moh.calibration_sequences,
        "train.sequence_length": config.train.sequence_length,
        "data.document_mask": config.data.document_mask,
        "run.seed": config.run.seed,
    }


def _asked(config: Config) -> dict[str, Any]:
    """As JSON knows it."""
    model, moh = config.model, config.moh
    asked: dict[str, Any] = {
        SOURCE: config.train.init_from,
        "model.vocab_size": model.tokens,
        "moh.enabled": moh.enabled,
    }
    if moh.enabled:
        asked |= {f"moh.{key}": getattr(moh, key) for key in ("router", "gating", "shared_heads", "shared_placement")}
    if is_measured(config):
        asked |= measured_with(config)
    return json.loads(json.dumps(asked))


def _asked_once(start: Path) -> dict[str, Any]:
    return read_json(start / _FILE, "what a start was made of", f"Delete {start} to make it again.")


def _same_place(there: Any, here: str | None) -> bool:
    return isinstance(there, str) and here is not None and Path(there).resolve() == Path(here).resolve()
