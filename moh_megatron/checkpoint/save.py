"""What goes into a checkpoint: copied to host memory, written file by file, and made visible when complete.

``saver.py`` says when each of these is done, and that all ranks have done theirs; ``native.py``, what it looks like.
"""

from __future__ import annotations

import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from moh_megatron.checkpoint import optimizer_state, random_states, weights
from moh_megatron.checkpoint.layout import (
    CONFIG,
    LATEST,
    PARTIAL,
    RANDOM_STATES,
    TOKENIZER,
    checkpoint_name,
    complete_checkpoints,
    topology_of,
)
from moh_megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    hash_file,
    package_versions,
    relative_files,
    write_manifest,
)
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.atomic import flush_names
from moh_megatron.parallel import groups
from moh_megatron.parallel.rng import capture


class SavesFiles(Protocol):
    """A tokenizer, as far as a checkpoint cares."""

    def save(self, folder: Path) -> None: ...


class HasState(Protocol):
    """A training engine, as far as a checkpoint cares."""

    @property
    def updates(self) -> int: ...

    def weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def optimizer_tensors(self) -> Iterable[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint, in host memory: what happens to the model afterwards does not touch it."""

    config: Config
    step: int
    data: str
    """One hash over the dataset's files."""
    tokenizer: SavesFiles
    weights: dict[str, Tensor] | None
    """This tensor-parallel rank's, where this is the first of its replicas."""
    optimizer: dict[str, Tensor]
    """This rank's share."""
    updates: int
    random_states: dict[str, Any]

    @classmethod
    def take(cls, config: Config, step: int, data: str, tokenizer: SavesFiles, engine: HasState) -> Snapshot:
        """Copy the state; every rank calls it."""
        replica, listed = groups.dp_group(), {rule.megatron for rule in rules(config)}
        held = {
            name: tensor.to("cpu", copy=True).contiguous()
            for name, tensor in engine.weights()
            if name in listed and replica.rank() == 0
        }
        return cls(
            config,
            step,
            data,
            tokenizer,
            weights=held if replica.rank() == 0 else None,
            optimizer=optimizer_state.deal(engine.optimizer_tensors(), replica.rank(), replica.size()),
            updates=engine.updates,
            random_states=capture(),
        )

    @property
    def nbytes(self) -> int:
        """What this rank is going to write, headers aside."""
        return sum(tensor.nbytes for part in (self.weights or {}, self.optimizer) for tensor in part.values())


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is put together."""
    return root / f"{PARTIAL}{checkpoint_name(step)}"


def make_room(root: Path, step: int) -> None:
    """Clear away what a killed run left behind, and make the folder of a new checkpoint; the first rank's task."""
    for stale in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(stale, ignore_errors=True)
    for folder in (weights.FOLDER, optimizer_state.FOLDER, RANDOM_STATES):
        (partial_folder(root, step) / folder).mkdir(parents=True)


def write_part(root: Path, snapshot: Snapshot) -> dict[str, FileEntry]:
    """Write this rank's files and flush them to the disk; returns them by name. Talks to no other rank."""
    config, folder = snapshot.config, partial_folder(root, snapshot.step)
    tensor, replica = groups.tp_group(), groups.dp_group()
    place = (tensor.rank(), tensor.size(), replica.rank(), replica.size())
    written = [optimizer_state.write_share(folder, snapshot.optimizer, snapshot.updates, place)]
    if snapshot.weights is not None:
        written.append(weights.write_shard(folder, snapshot.weights, tensor.rank(), tensor.size()))
    written.append(random_states.write(folder, snapshot.random_states))
    if dist.get_rank() == 0:
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        snapshot.tokenizer.save(folder / TOKENIZER)
        written += [folder / CONFIG, *(folder / TOKENIZER / name for name in relative_files(folder / TOKENIZER))]
    return {path.relative_to(folder).as_posix(): hash_file(path, flush=True) for path in written}


def publish(
    root: Path, snapshot: Snapshot, files: dict[str, FileEntry], world_size: int, in_use: Container[int]
) -> None:
    """Make a checkpoint complete and visible once every rank has written its part; the first rank's task.

    Then older ones are deleted, but none of the steps ``in_use``.
    """
    config, folder = snapshot.config, partial_folder(root, snapshot.step)
    final = root / checkpoint_name(snapshot.step)
    topology = topology_of(config, world_size)
    tokens = snapshot.step * config.train.tokens_per_step
    write_manifest(folder, Manifest(snapshot.step, tokens, topology, snapshot.data, package_versions(), files))
    replaced = root / f"{PARTIAL}replaced_{final.name}"
    if final.exists():  # a damaged one that was passed over
        final.rename(replaced)
    folder.rename(final)
    flush_names(root)
    temporary = root / f".{LATEST}"
    temporary.write_text(f"{final.name}\n", encoding="utf-8")
    temporary.replace(root / LATEST)
    flush_names(root)
    shutil.rmtree(replaced, ignore_errors=True)
    prune(root, config.checkpoint.keep_last, config.checkpoint.keep_every, snapshot.step, in_use)


def prune(
    root: Path, keep_last: int | None, keep_every: int | None, step: int, in_use: Container[int] = frozenset()
) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints up to ``step``, and those of every so many steps.

    Each disappears from view at once. A damaged one after ``step`` must not push a good one out. What a file server
    does not let go of, because somebody reads it, ``make_room`` clears away later.

    Args:
        in_use: steps of checkpoints that stay whatever their age.
    """
    up_to_now = list(complete_checkpoints(root, up_to=step))
    for checkpoint, manifest in up_to_now[keep_last:] if keep_last is not None else []:
        if manifest.step in in_use or (keep_every is not None and manifest.step % keep_every == 0):
            continue
        doomed = checkpoint.with_name(f"{PARTIAL}{checkpoint.name}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
