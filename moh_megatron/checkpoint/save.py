"""Takes a snapshot of the training state in host memory, writes it file by file, and commits the checkpoint.

``async_saver.py`` decides when each of these is done, and that all ranks have done theirs; ``layout.py`` describes the
files.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from moh_megatron.checkpoint import optimizer_state, weights
from moh_megatron.checkpoint.layout import (
    CONFIG,
    LATEST,
    PARTIAL,
    RANDOM_STATES,
    TOKENIZER,
    checkpoint_name,
    complete_checkpoints,
    random_states_file,
    topology_of,
)
from moh_megatron.checkpoint.manifest import Manifest, package_versions, relative_files, write_manifest
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.folders import flush_folder
from moh_megatron.io.hashing import FileEntry, hash_file
from moh_megatron.parallel import groups, rng


class SavesFiles(Protocol):
    """The tokenizer and the other files that a checkpoint takes along."""

    def save(self, folder: Path) -> None: ...


class HasState(Protocol):
    """What a checkpoint needs of a training engine."""

    @property
    def updates(self) -> int: ...

    def weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def optimizer_tensors(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint: a copy in host memory, which training does not change any more."""

    config: Config
    step: int
    data: str
    """One hash over the dataset's files."""
    extras: SavesFiles
    """Writes the folder of the tokenizer."""
    weights: dict[str, Tensor] | None
    """Weights of this tensor-parallel rank; None on all but the first of its replicas."""
    optimizer: dict[str, Tensor]
    """What this rank writes of the optimizer state."""
    updates: int
    random_states: dict[str, Any]

    @classmethod
    def take(cls, config: Config, step: int, data: str, extras: SavesFiles, engine: HasState) -> Snapshot:
        """Copy the state; every rank calls it."""
        dp_group, names = groups.dp_group(), {rule.megatron for rule in rules(config)}
        copies = {
            name: tensor.to("cpu", copy=True).contiguous()
            for name, tensor in engine.weights()
            if name in names and dp_group.rank() == 0
        }
        return cls(
            config,
            step,
            data,
            extras,
            weights=copies if dp_group.rank() == 0 else None,
            optimizer=optimizer_state.shard(engine.optimizer_tensors(), dp_group.rank(), dp_group.size()),
            updates=engine.updates,
            random_states=rng.capture(),
        )

    @property
    def nbytes(self) -> int:
        """Bytes that this rank is going to write, without headers."""
        return sum(tensor.nbytes for tensors in (self.weights or {}, self.optimizer) for tensor in tensors.values())


def partial_folder(root: Path, step: int) -> Path:
    """The folder in which a checkpoint is written before it is committed."""
    return root / f"{PARTIAL}{checkpoint_name(step)}"


def make_room(root: Path, step: int) -> None:
    """Remove what a killed run left behind, and make the folder of a new checkpoint; called on the first rank."""
    for stale in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
    for folder in (weights.FOLDER, optimizer_state.FOLDER, RANDOM_STATES):
        (partial_folder(root, step) / folder).mkdir(parents=True)


def write_part(root: Path, snapshot: Snapshot) -> dict[str, FileEntry]:
    """Write this rank's files and flush them to the disk; returns them by name. Communicates with no other rank."""
    config, folder = snapshot.config, partial_folder(root, snapshot.step)
    tp_group, dp_group = groups.tp_group(), groups.dp_group()
    coordinates = (tp_group.rank(), tp_group.size(), dp_group.rank(), dp_group.size())
    written = [optimizer_state.write_shard(folder, snapshot.optimizer, snapshot.updates, coordinates)]
    if snapshot.weights is not None:
        written.append(weights.write_shard(folder, snapshot.weights, tp_group.rank(), tp_group.size()))
    written.append(random_states_file(folder, dist.get_rank()))
    rng.write(written[-1], snapshot.random_states)
    if dist.get_rank() == 0:
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        snapshot.extras.save(folder / TOKENIZER)
        written += [folder / CONFIG, *(folder / TOKENIZER / name for name in relative_files(folder / TOKENIZER))]
    return {path.relative_to(folder).as_posix(): hash_file(path, flush=True) for path in written}


def commit(
    root: Path, snapshot: Snapshot, files: dict[str, FileEntry], world_size: int, in_use: Container[int]
) -> None:
    """Make a checkpoint complete and visible once every rank has written its part; called on the first rank.

    Then older ones are deleted, except those of the steps ``in_use``.
    """
    config, folder = snapshot.config, partial_folder(root, snapshot.step)
    final = root / checkpoint_name(snapshot.step)
    topology = topology_of(config, world_size)
    tokens = snapshot.step * config.train.tokens_per_step
    write_manifest(folder, Manifest(snapshot.step, tokens, topology, snapshot.data, package_versions(), files))
    replaced = root / f"{PARTIAL}replaced_{final.name}"
    if final.exists():  # It is damaged, and was passed over.
        final.rename(replaced)
    folder.rename(final)
    flush_folder(root)
    temporary = root / f".{LATEST}"
    temporary.write_text(f"{final.name}\n", encoding="utf-8")
    temporary.replace(root / LATEST)
    flush_folder(root)
    shutil.rmtree(replaced, ignore_errors=True)
    prune(root, config.checkpoint.keep_last, config.checkpoint.keep_every, snapshot.step, in_use)


def prune(
    root: Path, keep_last: int | None, keep_every: int | None, step: int, in_use: Container[int] = frozenset()
) -> None:
    """Delete complete checkpoints up to ``step``, except the newest ``keep_last`` and every ``keep_every``-th step.

    A checkpoint is renamed before it is deleted, so that none is ever seen in part. Later ones than ``step`` are
    damaged and do not count. What cannot be deleted, because a file server says that it is in use, ``make_room``
    removes later.

    Args:
        in_use: steps of checkpoints that are kept whatever their age.
    """
    checkpoints = list(complete_checkpoints(root, up_to=step))
    for checkpoint, manifest in checkpoints[keep_last:] if keep_last is not None else []:
        if manifest.step in in_use or (keep_every is not None and manifest.step % keep_every == 0):
            continue
        renamed = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}")
        checkpoint.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)
