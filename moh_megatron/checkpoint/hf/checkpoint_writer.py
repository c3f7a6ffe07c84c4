"""Writes a checkpoint of weights only from a stream of tensors, without a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from moh_megatron.checkpoint import weights
from moh_megatron.checkpoint.hf.streaming import one_thread
from moh_megatron.checkpoint.layout import CONFIG, TOKENIZER
from moh_megatron.checkpoint.manifest import Manifest, Topology, package_versions, relative_files, write_manifest
from moh_megatron.checkpoint.mapping import rules, shard_rows, shard_shape
from moh_megatron.checkpoint.save import SavesFiles
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.hashing import FileEntry, hash_file
from moh_megatron.io.safetensors_stream import SafetensorsWriter


def write_checkpoint(
    folder: Path,
    config: Config,
    dtypes: Mapping[str, torch.dtype],
    chunks: Iterable[tuple[str, Tensor]],
    extras: SavesFiles,
) -> None:
    """Fill an empty ``folder`` with a checkpoint of step 0, sharded for ``parallel.tensor``.

    Args:
        dtypes: dtype of each tensor, under Megatron-core's names.
        chunks: (name, rows) of full tensors, in the table's order. The rows of one may come in several chunks, and
            each chunk is used only until the next one is asked for.
        extras: writes the folder of the tokenizer.
    """
    files = _write_weights(folder, config, dtypes, chunks)
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    extras.save(folder / TOKENIZER)
    files |= {name: hash_file(folder / name, flush=True) for name in relative_files(folder) if name not in files}
    topology = Topology(config.parallel.tensor, 1, config.parallel.zero_stage, config.train.precision)
    write_manifest(folder, Manifest(0, 0, topology, "", package_versions(), files))


def _write_weights(
    folder: Path, config: Config, dtypes: Mapping[str, torch.dtype], chunks: Iterable[tuple[str, Tensor]]
) -> dict[str, FileEntry]:
    world, table = config.parallel.tensor, {rule.megatron: rule for rule in rules(config)}
    tensors = {name: (dtypes[name], shard_shape(rule, world)) for name, rule in table.items()}
    files = [weights.shard_file(folder, rank, world) for rank in range(world)]
    files[0].parent.mkdir()
    with one_thread(), ExitStack() as stack:
        writers = [stack.enter_context(SafetensorsWriter(file, tensors, hashed=True)) for file in files]
        current, row = "", 0
        for name, chunk in chunks:
            row = row if name == current else 0
            for rank, rows in shard_rows(table[name], row, chunk, world):
                writers[rank].append(name, rows)
            current, row = name, row + len(chunk)
    return {file.relative_to(folder).as_posix(): writer.entry for file, writer in zip(files, writers, strict=True)}
