"""Weights as safetensors, one file a tensor-parallel rank; readable whole, or cut for another tensor-parallel size.

Everything the table of names lists is here: parameters, and buffers that a model keeps. Integers stay integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moh_megatron.checkpoint.mapping import Rule, merge_shards, rules, split_shard
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.model.tensors import model_tensors

FOLDER = "weights"


def shard_file(folder: Path, rank: int, size: int) -> Path:
    """The file of one tensor-parallel rank's tensors."""
    return folder / FOLDER / f"tp_rank_{rank:02d}_of_{size:02d}.safetensors"


def write_shard(folder: Path, tensors: Mapping[str, Tensor], rank: int, size: int) -> Path:
    """Write one tensor-parallel rank's tensors, under Megatron-core's names, into the folder ``FOLDER`` of ``folder``;
    returns the file."""
    path = shard_file(folder, rank, size)
    save_file(dict(tensors), path)
    return path


class Stored:
    """The weights of a checkpoint on disk, tensor by tensor, whatever tensor-parallel size wrote them."""

    def __init__(self, shards: Mapping[int, Any]) -> None:
        self._shards = shards

    def dtype(self, rule: Rule) -> torch.dtype:
        """Of a tensor that is not read for it."""
        return self._shards[0].get_slice(rule.megatron)[:0].dtype

    def whole(self, rule: Rule) -> Tensor:
        """Heads in physical order."""
        return reshard(_reader(self._shards, rule.megatron), rule, len(self._shards), 0, 1)


@contextmanager
def opened(folder: Path, config: Config) -> Iterator[Stored]:
    """The weights of ``folder``, a checkpoint that ``config`` wrote."""
    with ExitStack() as stack:
        yield Stored(_open(stack, folder, config, range(config.parallel.tensor)))


def read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Every tensor whole, heads in physical order, whatever tensor-parallel size wrote it."""
    with opened(folder, config) as stored:
        return {rule.megatron: stored.whole(rule) for rule in rules(config)}


@torch.no_grad()
def load_into(model: nn.Module, config: Config, folder: Path, written_by: Config, rank: int) -> None:
    """Copy tensor-parallel ``rank``'s share of a checkpoint's weights into ``model``, in the model's precision.

    Router biases that the checkpoint lacks stay as they are: it was balanced by a loss.

    Args:
        config: the model's own configuration.
        written_by: the configuration of the checkpoint ``folder``.

    Raises:
        UserError: the checkpoint lacks a tensor of the model.
    """
    there, here = written_by.parallel.tensor, config.parallel.tensor
    own, stored = model_tensors(model), {rule.megatron: rule for rule in rules(written_by)}
    same = there == here and written_by.model.vocab_size == config.model.vocab_size
    with ExitStack() as stack:
        shards = _open(stack, folder, written_by, [rank] if same else range(there))
        held = set(next(iter(shards.values())).keys())
        for rule in rules(config):
            if rule.megatron not in held:
                if rule.dtype is not None:
                    continue
                raise UserError(f"{folder} holds no {rule.megatron}. The weights must be of the same architecture.")
            read = _reader(shards, rule.megatron)
            if rule.padding == stored[rule.megatron].padding:
                own[rule.megatron].copy_(reshard(read, rule, there, rank, here))
            else:
                padded = rule.join(stored[rule.megatron].split(reshard(read, stored[rule.megatron], there, 0, 1)))
                own[rule.megatron].copy_(split_shard(padded, rule.dim, rule.stride, rank, here))


def reshard(shard_of: Callable[[int], Tensor], rule: Rule, there: int, rank: int, here: int) -> Tensor:
    """What ``rank`` of ``here`` tensor-parallel ranks holds of a tensor cut over ``there`` ranks.

    ``shard_of`` gives the part of one of those; only what is needed is asked for.
    """
    if there == here:
        return shard_of(rank)
    needed = range(there) if rule.dim is not None else range(1)
    whole = merge_shards([shard_of(each) for each in needed], rule.dim, rule.stride)
    return split_shard(whole, rule.dim, rule.stride, rank, here)


def _open(stack: ExitStack, folder: Path, config: Config, ranks: Any) -> dict[int, Any]:
    size = config.parallel.tensor
    return {rank: stack.enter_context(safe_open(shard_file(folder, rank, size), "pt")) for rank in ranks}


def _reader(shards: Mapping[int, Any], name: str) -> Callable[[int], Tensor]:
    return lambda rank: shards[rank].get_tensor(name)
