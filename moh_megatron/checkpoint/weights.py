"""Writes weights as safetensors, one file a tensor-parallel rank, and reads them at any tensor-parallel size.

The files hold every tensor of the table of names: parameters, and buffers that a model keeps. Integers stay integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moh_megatron.checkpoint.manifest import WEIGHTS
from moh_megatron.checkpoint.mapping import (
    Rule,
    check_names_and_shapes,
    merge_shards,
    rules,
    shard_shape,
    split_shard,
    unshard_rows,
)
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.safetensors_stream import SafetensorsFile, Scratch
from moh_megatron.model.tensors import model_tensors

FOLDER = WEIGHTS


def shard_file(folder: Path, rank: int, size: int) -> Path:
    """The file of one tensor-parallel rank's tensors."""
    return folder / FOLDER / f"tp_rank_{rank:02d}_of_{size:02d}.safetensors"


def write_shard(folder: Path, tensors: Mapping[str, Tensor], rank: int, size: int) -> Path:
    """Write one tensor-parallel rank's tensors, under Megatron-core's names, into the folder ``FOLDER`` of ``folder``;
    returns the file."""
    path = shard_file(folder, rank, size)
    save_file(dict(tensors), path)
    return path


class StoredWeights:
    """The weights of a checkpoint, read tensor by tensor, whatever tensor-parallel size wrote them.

    Heads are in physical order. The tensors that a call returns are overwritten by the next call.

    Args:
        shards: files by tensor-parallel rank; not all are needed to read what one of ``size`` ranks holds.
        size: how many tensor-parallel ranks wrote them.
    """

    def __init__(self, shards: Mapping[int, SafetensorsFile], size: int) -> None:
        self._shards, self._size, self._scratch = shards, size, Scratch()
        self._any = next(iter(shards.values()))

    def __contains__(self, rule: Rule) -> bool:
        return rule.megatron in self._any.entries

    def dtype(self, rule: Rule) -> torch.dtype:
        """The dtype in the file."""
        return self._any.entries[rule.megatron].dtype

    def chunks(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        """Rows ``start`` to ``stop`` of the full tensor, in one or more chunks."""
        self._scratch.reset()

        def read(rank: int, first: int, end: int) -> Tensor:
            return self._shards[rank].rows(rule.megatron, first, end, self._scratch)

        yield from unshard_rows(rule, start, stop, self._size, read)

    def full_tensor(self, rule: Rule) -> Tensor:
        """The full tensor."""
        return self.shard(rule, 0, 1)

    def shard(self, rule: Rule, rank: int, size: int) -> Tensor:
        """What ``rank`` of ``size`` tensor-parallel ranks holds."""
        self._scratch.reset()
        return reshard(
            lambda saved_rank: self._shards[saved_rank].read(rule.megatron, self._scratch),
            rule,
            self._size,
            rank,
            size,
        )

    def check_complete(self, config: Config) -> None:
        """Raise UserError unless every file holds exactly the tensors that ``config`` gives it."""
        shapes = {rule.megatron: shard_shape(rule, self._size) for rule in rules(config)}
        for shard in self._shards.values():
            check_names_and_shapes(shard.entries, shapes, str(shard.path))


@contextmanager
def open_stored(folder: Path, config: Config, ranks: Iterable[int] | None = None) -> Iterator[StoredWeights]:
    """Open the weights of ``folder``, a checkpoint that ``config`` wrote.

    Args:
        ranks: tensor-parallel ranks whose files are opened; None opens all.

    Raises:
        UserError: a file is missing or broken.
    """
    size = config.parallel.tensor
    with ExitStack() as stack:
        shards = {}
        for rank in range(size) if ranks is None else ranks:
            shards[rank] = SafetensorsFile(shard_file(folder, rank, size))
            stack.callback(shards[rank].close)
        yield StoredWeights(shards, size)


def read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Every full tensor, heads in physical order, whatever tensor-parallel size wrote it."""
    with open_stored(folder, config) as stored:
        return {rule.megatron: stored.full_tensor(rule).clone() for rule in rules(config)}


@torch.no_grad()
def load_into(model: nn.Module, config: Config, folder: Path, written_by: Config, rank: int) -> None:
    """Copy tensor-parallel ``rank``'s shard of a checkpoint's weights into ``model``, in the model's precision.

    Router biases that the checkpoint lacks, because it was balanced by a loss, keep their values.

    Args:
        config: the model's own configuration.
        written_by: the configuration of the checkpoint ``folder``.

    Raises:
        UserError: the checkpoint lacks a tensor of the model.
    """
    saved_size, current_size = written_by.parallel.tensor, config.parallel.tensor
    own, saved_rules = model_tensors(model), {rule.megatron: rule for rule in rules(written_by)}
    same = saved_size == current_size and written_by.model.vocab_size == config.model.vocab_size
    with open_stored(folder, written_by, [rank] if same else None) as stored:
        for rule in rules(config):
            if rule not in stored:
                if rule.dtype is not None:
                    continue
                raise UserError(f"{folder} holds no {rule.megatron}. The weights must be of the same architecture.")
            saved = saved_rules[rule.megatron]
            if rule.padding == saved.padding:
                own[rule.megatron].copy_(stored.shard(rule, rank, current_size))
            else:
                padded = rule.join(saved.split(stored.full_tensor(saved)))
                own[rule.megatron].copy_(split_shard(padded, rule.dim, rule.stride, rank, current_size))


def reshard(read_shard: Callable[[int], Tensor], rule: Rule, saved_size: int, rank: int, current_size: int) -> Tensor:
    """What ``rank`` of ``current_size`` tensor-parallel ranks holds of a tensor that ``saved_size`` ranks saved.

    ``read_shard`` returns the shard of one of those; it is called only for what is needed.
    """
    if saved_size == current_size:
        return read_shard(rank)
    needed = range(saved_size) if rule.dim is not None else range(1)
    full_tensor = merge_shards([read_shard(saved_rank) for saved_rank in needed], rule.dim, rule.stride)
    return split_shard(full_tensor, rule.dim, rule.stride, rank, current_size)
