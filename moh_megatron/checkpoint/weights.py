"""Weights as safetensors, one file a tensor-parallel rank; readable whole, or cut for another tensor-parallel size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moh_megatron.checkpoint.mapping import merge_shards, rules, split_shard
from moh_megatron.config.schema import Config
from moh_megatron.model.tensors import model_tensors

FOLDER = "weights"


def _file(folder: Path, rank: int, size: int) -> Path:
    return folder / FOLDER / f"tp_rank_{rank:02d}_of_{size:02d}.safetensors"


def write_shard(folder: Path, tensors: Iterable[tuple[str, Tensor]], rank: int, size: int) -> None:
    """This tensor-parallel rank's tensors, under Megatron-core's names; all are held in host memory meanwhile."""
    path = _file(folder, rank, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu().contiguous() for name, value in tensors}, path)


def read_weights(folder: Path, config: Config) -> dict[str, Tensor]:
    """Every tensor whole, heads in physical order, whatever tensor-parallel size wrote it."""
    size = config.parallel.tensor
    with ExitStack() as stack:
        shards = [stack.enter_context(safe_open(_file(folder, rank, size), "pt")) for rank in range(size)]
        return {
            rule.megatron: merge_shards([shard.get_tensor(rule.megatron) for shard in shards], rule.dim, rule.stride)
            for rule in rules(config)
        }


@torch.no_grad()
def load_into(model: nn.Module, whole: Mapping[str, Tensor], config: Config, rank: int, size: int) -> None:
    """Copy this tensor-parallel rank's share of whole tensors into ``model``, in the model's precision.

    Router biases that ``whole`` lacks stay as they are: it was balanced by a loss.
    """
    table = {rule.megatron: rule for rule in rules(config)}
    for name, tensor in model_tensors(model).items():
        rule = table[name]
        if name in whole or rule.dtype is None:
            tensor.copy_(split_shard(whole[name], rule.dim, rule.stride, rank, size))
