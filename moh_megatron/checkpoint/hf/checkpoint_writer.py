"""A checkpoint written from a stream of tensors, with no training run behind it: nothing but weights to start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moh_megatron.checkpoint import weights
from moh_megatron.checkpoint.direct_file import BLOCKS
from moh_megatron.checkpoint.hf.safetensors_stream import SafetensorsWriter
from moh_megatron.checkpoint.hf.streaming import deal, one_thread, shard_shape
from moh_megatron.checkpoint.layout import CONFIG, TOKENIZER
from moh_megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Topology,
    hash_file,
    package_versions,
    relative_files,
    write_manifest,
)
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config


class SavesFiles(Protocol):
    """A tokenizer, as far as a checkpoint cares."""

    def save(self, folder: Path) -> None: ...


def write_checkpoint(
    folder: Path,
    config: Config,
    dtypes: Mapping[str, torch.dtype],
    pieces: Iterable[tuple[str, Tensor]],
    tokenizer: SavesFiles,
) -> None:
    """Fill an empty ``folder`` with a checkpoint of step 0, cut for ``parallel.tensor``.

    Args:
        dtypes: of each tensor, under Megatron-core's names.
        pieces: (name, rows) of whole tensors, in the table's order; the rows of one may come in several pieces, each
            looked at no longer than until the next is asked for.
        tokenizer: what goes into the folder of that name.
    """
    files = _write_weights(folder, config, dtypes, pieces)
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    tokenizer.save(folder / TOKENIZER)
    files |= {name: hash_file(folder / name, flush=True) for name in relative_files(folder) if name not in files}
    topology = Topology(config.parallel.tensor, 1, config.parallel.zero_stage, config.train.precision)
    write_manifest(folder, Manifest(0, 0, topology, "", package_versions(), files))


def _write_weights(
    folder: Path, config: Config, dtypes: Mapping[str, torch.dtype], pieces: Iterable[tuple[str, Tensor]]
) -> dict[str, FileEntry]:
    world, table = config.parallel.tensor, {rule.megatron: rule for rule in rules(config)}
    tensors = {name: (dtypes[name], shard_shape(rule, world)) for name, rule in table.items()}
    files = [weights.shard_file(folder, rank, world) for rank in range(world)]
    files[0].parent.mkdir()
    with one_thread(), ExitStack() as stack:
        # All files grow side by side, and share the memory of one. Two blocks are the least: one is filled.
        chosen = {"hashed": True, "blocks": max(2, BLOCKS // world)}
        writers = [stack.enter_context(SafetensorsWriter(file, tensors, **chosen)) for file in files]
        current, row = "", 0
        for name, piece in pieces:
            row = row if name == current else 0
            for rank, part in deal(table[name], row, piece, world):
                writers[rank].append(name, part)
            current, row = name, row + len(piece)
    return {file.relative_to(folder).as_posix(): each.entry for file, each in zip(files, writers, strict=True)}
