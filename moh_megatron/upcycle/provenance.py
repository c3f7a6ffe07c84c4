"""Records what the initial checkpoint of continue-tuning was made of, so that no other configuration uses it."""

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
_ROUTING = ("router", "gating", "shared_heads", "shared_placement", "routing_groups", "gate_softmax")
_ADDED_LATER: dict[str, Any] = {"moh.routing_groups": 1, "moh.gate_softmax": "layer"}
"""What older records, which lack these values, mean."""


def exists(folder: Path) -> bool:
    """Whether ``folder`` has a record, and so a complete initial checkpoint: both appear at once."""
    return (folder / _FILE).is_file()


def write(folder: Path, config: Config, weights: str, data: str) -> None:
    """Record in ``folder`` the values of ``config`` and the hashes of weights and data that it is made of."""
    write_json(folder / _FILE, {**_values(config), WEIGHTS: weights[:12], DATA: data[:12]})


def require_same(folder: Path, config: Config, data: str | None = None) -> None:
    """Raise UserError where ``config`` calls for another initial checkpoint than the one in ``folder``.

    ``data`` is the hash of the prepared data; it matters to measured heads alone.
    """
    recorded, current = _ADDED_LATER | _recorded(folder), _values(config)
    if _same_path(recorded.get(SOURCE), config.train.init_from):
        recorded[SOURCE] = current[SOURCE]
    if data is not None:
        current[DATA] = data[:12]
    remedy = "Name the same, or another run.dir, or delete the folder to make it again."
    refuse_differences(f"{folder} was made with other values", recorded, current, remedy)


def warn_of_other_weights(folder: Path, config: Config) -> None:
    """Warn where train.init_from holds other weights by now than ``folder`` was made of.

    A run folder may have new checkpoints since. A source that no longer exists is no reason for a warning.
    """
    source = Path(config.train.init_from or "")
    current = _weights_hash(source)
    if current is None:
        return
    if current != (recorded := _recorded(folder).get(WEIGHTS)):
        logger.warning(
            f"{source} holds other weights, {current}, than {folder} was made of, {recorded}. Delete that folder, or "
            "name another run.dir, to start from them."
        )


def _weights_hash(source: Path) -> str | None:
    """The hash that ``write`` records, of a checkpoint or the newest one of a run; weights are not read."""
    for folder in (source, *step_folders(source), *step_folders(source / "checkpoints")):
        with suppress(ValueError):
            return read_manifest(folder).weights_sha256[:12]
    return None


def is_measured(config: Config) -> bool:
    """Whether ``config`` takes its shared heads from a calibration."""
    return config.moh.enabled and config.moh.shared_placement == "calibrated"


def measured_with(config: Config) -> dict[str, Any]:
    """The settings that determine a calibration, beside weights and data."""
    return {
        "moh.calibration_sequences": config.moh.calibration_sequences,
        "train.sequence_length": config.train.sequence_length,
        "data.document_mask": config.data.document_mask,
        "run.seed": config.run.seed,
    }


def _values(config: Config) -> dict[str, Any]:
    """The values of ``config`` that determine the initial checkpoint, as JSON represents them."""
    model, moh = config.model, config.moh
    values: dict[str, Any] = {
        SOURCE: config.train.init_from,
        "model.vocab_size": model.tokens,
        "moh.enabled": moh.enabled,
    }
    if moh.enabled:
        values |= {f"moh.{key}": getattr(moh, key) for key in _ROUTING}
    if is_measured(config):
        values |= measured_with(config)
    return json.loads(json.dumps(values))


def _recorded(folder: Path) -> dict[str, Any]:
    return read_json(folder / _FILE, "what a start was made of", f"Delete {folder} to make it again.")


def _same_path(recorded: Any, current: str | None) -> bool:
    return isinstance(recorded, str) and current is not None and Path(recorded).resolve() == Path(current).resolve()
