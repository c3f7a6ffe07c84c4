"""Writing a checkpoint: whole or not at all, by every rank together. ``native.py`` says what it looks like."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from moh_megatron.checkpoint import random_states, weights
from moh_megatron.checkpoint.manifest import FileEntry, Manifest, hash_file, relative_files, write_manifest
from moh_megatron.checkpoint.native import (
    CONFIG,
    ENGINE,
    TOKENIZER,
    checkpoint_name,
    complete_checkpoints,
    topology_of,
)
from moh_megatron.config.errors import Fault
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.parallel import groups

_PACKAGES = ("torch", "megatron-core", "deepspeed")
_PARTIAL = ".partial_"


class SavesFiles(Protocol):
    """A tokenizer, as far as a checkpoint cares."""

    def save(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint."""

    config: Config
    step: int
    tokens: int
    data: str
    weights: Callable[[], Iterable[tuple[str, Tensor]]]
    """This tensor-parallel rank's part of the model, whole; may gather, so every rank iterates to the end."""
    tokenizer: SavesFiles
    save_engine: Callable[[Path], None]
    """Writes DeepSpeed's part into a folder; called on every rank."""
    expected_bytes: int
    """What this rank is going to write, roughly."""


def save(root: Path, contents: Contents) -> Path:
    """Write one checkpoint below ``root``; every rank calls it. Returns its folder.

    Raises:
        Fault: the disk is full or not writable; what was complete before is untouched.
    """
    final, partial = root / checkpoint_name(contents.step), root / f"{_PARTIAL}{checkpoint_name(contents.step)}"
    first = dist.get_rank() == 0
    if first:
        for stale in root.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=True)
    _require_space(root, contents)
    try:
        if first:
            random_states.make_folder(partial)
            (partial / CONFIG).write_text(dump_config(contents.config), encoding="utf-8")
            contents.tokenizer.save(partial / TOKENIZER)
        dist.barrier()
        contents.save_engine(partial / ENGINE)
        if groups.data_group().rank() == 0:
            rank = groups.tensor_group().rank()
            weights.write_shard(partial, contents.weights(), rank, contents.config.parallel.tensor)
        else:
            for _ in contents.weights():
                pass
        random_states.write(partial)
        dist.barrier()
        files = _hash_together(partial)
        if first:
            write_manifest(partial, _manifest(contents, files))
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        dist.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _disk_failure(error)
        if reason is None:
            raise
        # The partial folder stays until the next start: another rank may still be writing into it.
        raise Fault(_cannot_write(root, contents.step, reason)) from error
    return final


def _disk_failure(error: Exception) -> str | None:
    """What the disk refused, or None if ``error`` is something else."""
    if isinstance(error, FileNotFoundError):
        return None  # somebody deleted the folder: no matter of space
    if not isinstance(error, RuntimeError):
        return f"{error}."
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    if any(writer in str(error) for writer in ("PytorchStreamWriter", "inline_container")):
        return "a file could not be written whole; the disk, a quota or a limit on file sizes is exhausted."
    return None


def _cannot_write(root: Path, step: int, reason: str) -> str:
    newest = next((path.name for path, _ in complete_checkpoints(root)), "none")
    return (
        f"the checkpoint of step {step} cannot be written to {root}: {reason.strip()} "
        f"Free space there or set run.dir to another disk, and start again. Newest complete checkpoint: {newest}."
    )


def _require_space(root: Path, contents: Contents) -> None:
    """End on every rank alike before anything is written where the disk clearly cannot hold it."""
    needed = torch.tensor([contents.expected_bytes], dtype=torch.float64, device=_device())
    dist.all_reduce(needed)
    verdict: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(root).free
            if free < needed.item():
                need = f"{needed.item() / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free."
                verdict[0] = _cannot_write(root, contents.step, f"No space left on device ({need})")
        except OSError as error:
            verdict[0] = _cannot_write(root, contents.step, f"{error}.")
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise Fault(verdict[0])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _manifest(contents: Contents, files: dict[str, FileEntry]) -> Manifest:
    versions = {package: version(package) for package in _PACKAGES}
    topology = topology_of(contents.config, dist.get_world_size())
    return Manifest(contents.step, contents.tokens, topology, contents.data, versions, files)


def _share(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def _hash_together(folder: Path) -> dict[str, FileEntry]:
    own = {name: hash_file(folder / name, flush=True) for name in _share(relative_files(folder))}
    parts: list[dict[str, FileEntry]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, own)
    return {name: entry for part in parts for name, entry in part.items()}


def prune(root: Path, keep_last: int, step: int) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints up to ``step``; each disappears from view at once.

    What lies after ``step`` was passed over as damaged when this run went on: it must not push a good one out.
    """
    up_to_now = [checkpoint for checkpoint, manifest in complete_checkpoints(root) if manifest.step <= step]
    for checkpoint in up_to_now[keep_last:]:
        doomed = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)
