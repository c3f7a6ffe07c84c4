"""Names the files of a checkpoint, and finds the checkpoints of a run, newest first.

    checkpoints/step_00000100/
        manifest.json      files with sizes and hashes, step, tokens, topology, versions; written last, with its own
        manifest.sha256    hash, as sha256sum writes it
        config.yaml        the resolved configuration
        weights/           safetensors, one file a tensor-parallel rank
        optimizer/         safetensors, one file a rank: Adam's moments and master weights, by parameter name
        rng/               random states, one file a rank
        tokenizer/         the tokenizer, and the ``HFExtras``
    checkpoints/latest     the name of the newest one; changed last

A checkpoint is written under a name that starts with ``.partial`` and renamed when complete. ``latest`` is
for people and scripts: a run resumes from the newest checkpoint whose files are what its manifest says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moh_megatron.checkpoint.manifest import OPTIMIZER, WEIGHTS, Manifest, Topology, damage, read_manifest
from moh_megatron.config.load import load_config
from moh_megatron.config.paths import require_folder
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault, UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, LATEST, PARTIAL = "config.yaml", "tokenizer", "latest", ".partial_"
HF_CONFIG = "config.json"
"""Tells a Hugging Face folder from a checkpoint."""
RANDOM_STATES = "rng"
_RESUME_ONLY = (OPTIMIZER, RANDOM_STATES, "engine")
"""Folders that are needed to resume only; the last one is DeepSpeed's, of format version 1."""
_STEP_PATTERN = "step_" + "[0-9]" * 8


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def topology_of(config: Config, world_size: int) -> Topology:
    """How ``config`` distributes a run over ``world_size`` ranks."""
    parallel = config.parallel
    return Topology(parallel.tensor, world_size // parallel.tensor, parallel.zero_stage, config.train.precision)


def step_folders(root: Path) -> list[Path]:
    """Folders below ``root`` that are named as checkpoints, newest first, whatever they contain."""
    return sorted(root.glob(_STEP_PATTERN), reverse=True) if root.is_dir() else []


def complete_checkpoints(root: Path, up_to: int | None = None) -> Iterator[tuple[Path, Manifest]]:
    """Checkpoints with a readable manifest, newest first, of steps up to ``up_to`` if that is given.

    A checkpoint of a later step than the run's own was passed over as damaged when the run resumed.
    """
    for folder in step_folders(root):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue
        if up_to is None or manifest.step <= up_to:
            yield folder, manifest


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is one checkpoint, complete or not, rather than a folder of them."""
    return path.resolve().match(_STEP_PATTERN) or (path / WEIGHTS).is_dir()


def require_checkpoints(path: Path) -> list[Path]:
    """The folders that ``resolve_checkpoint`` would try, newest first; nothing in them is read.

    Raises UserError where there is none.
    """
    require_folder(path, "a checkpoint, a folder of checkpoints, or a run folder")
    if is_checkpoint(path):
        return [path]
    folders = [*step_folders(path), *step_folders(path / "checkpoints")]
    if not folders:
        raise _no_checkpoint(path)
    return folders


def _no_checkpoint(path: Path) -> UserError:
    if (path / HF_CONFIG).is_file():
        return UserError(
            f"{path} holds no complete checkpoint. Got a Hugging Face folder; make one of it: "
            f"moh-convert hf-to-megatron --hf-dir {path} --save-dir CKPT."
        )
    return UserError(f"{path} holds no complete checkpoint. Expected folders named step_00000000 with a manifest.json.")


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` names: itself, or the newest good one in a folder of checkpoints or a run folder.

    A warning names every checkpoint that is passed over because its files are not what its manifest says.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    path = Path(path)
    folders = require_checkpoints(path)
    if is_checkpoint(path):
        problem = problem_with(path, weights_only=True)
        if problem is not None:
            raise UserError(f"{path} is not a complete checkpoint: {problem}. Use another one, or make it again.")
        return path
    for folder in folders:
        problem = problem_with(folder, weights_only=True)
        if problem is None:
            return folder
        logger.warning(f"{folder} is passed over: {problem}")
    raise _no_checkpoint(path)


def problem_with(folder: Path, *, weights_only: bool = False) -> str | None:
    """Why ``folder`` cannot be used as a checkpoint, or None; reads every file.

    ``weights_only`` leaves out what is needed to resume only: the optimizer state is by far the largest part.
    """
    try:
        manifest = read_manifest(folder)
        names = [name for name in manifest.files if not (weights_only and name.split("/")[0] in _RESUME_ONLY)]
        return damage(folder, manifest, names)
    except ValueError as error:
        return str(error)


def read_state(checkpoint: Path) -> Manifest:
    """The manifest of a complete checkpoint. Raises Fault where it cannot be read any more."""
    try:
        return read_manifest(checkpoint)
    except ValueError as error:
        raise Fault(f"{checkpoint} cannot be used: {error}. It was found complete before: start again.") from None


def read_config(checkpoint: Path) -> Config:
    """The configuration a checkpoint was written with."""
    return load_config(checkpoint / CONFIG)


def read_config_if_sound(checkpoint: Path) -> Config | None:
    """The configuration of a checkpoint that may be damaged; None where it has none that can be read."""
    try:
        return read_config(checkpoint)
    except (OSError, UserError):
        return None


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Every full tensor, under Megatron-core's names, heads in physical order."""
    # Imported here, so that a checkpoint is found before torch is imported.
    from moh_megatron.checkpoint import weights

    return weights.read_weights(checkpoint, read_config(checkpoint))


def tokenizer_folder(checkpoint: Path) -> Path:
    """The tokenizer that a checkpoint was trained with."""
    return checkpoint / TOKENIZER


def random_states_file(checkpoint: Path, rank: int) -> Path:
    """The random states of one of all ranks."""
    return checkpoint / RANDOM_STATES / f"rank_{rank:05d}.pt"
