"""Optimizer state by parameter name, so that it can be read at any parallelism and any ZeRO stage.

Every tensor has its parameter's shape and is called ``slot/parameter``, such as ``exp_avg/output_layer.weight``. The
tensors of one tensor-parallel rank are dealt out over its data-parallel ranks, a safetensors file each.

DeepSpeed's own files follow its partitions instead. Its universal checkpoints, which undo that, cover neither stage 0
nor a change between stage 3 and the others, and cut no tensor-parallel shards at stage 3: see docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moh_megatron.checkpoint.mapping import rules
from moh_megatron.checkpoint.weights import reshard
from moh_megatron.config.schema import Config

FOLDER = "optimizer"
_UPDATES = "updates"


def deal(tensors: Iterable[tuple[str, Tensor]], rank: int, size: int) -> dict[str, Tensor]:
    """Host copies of the tensors that fall to ``rank`` of ``size``, each one to whoever has least so far.

    Every rank goes through all of ``tensors``: making one may need them all.
    """
    loads, own = [0] * size, {}
    for name, tensor in tensors:
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            own[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return own


def write_share(folder: Path, tensors: Mapping[str, Tensor], updates: int, place: tuple[int, int, int, int]) -> Path:
    """Write one rank's share into the folder ``FOLDER`` of ``folder``; returns the file. Called for every rank.

    Args:
        updates: how many times the optimizer has updated the weights.
        place: tensor-parallel rank and size, data-parallel rank and size.
    """
    path = folder / FOLDER / "tp_rank_{:02d}_of_{:02d}.dp_rank_{:04d}_of_{:04d}.safetensors".format(*place)
    save_file(dict(tensors), path, {_UPDATES: str(updates)})
    return path


class StoredState:
    """The optimizer state of a checkpoint, for one tensor-parallel rank of whatever size; a context manager.

    Args:
        written_by: the configuration of the checkpoint ``folder``.
    """

    def __init__(self, folder: Path, written_by: Config, rank: int, size: int) -> None:
        self._rank, self._size, self._there = rank, size, written_by.parallel.tensor
        self._rules = {rule.megatron: rule for rule in rules(written_by)}
        self._shards: dict[tuple[int, str], Any] = {}
        self._stack = ExitStack()
        self.updates = 0
        """How many times the optimizer had updated the weights."""
        for each in [rank] if size == self._there else range(self._there):
            for path in sorted((folder / FOLDER).glob(f"tp_rank_{each:02d}_of_*")):
                shard = self._stack.enter_context(safe_open(path, "pt"))
                self._shards |= {(each, name): shard for name in shard.keys()}  # noqa: SIM118
                self.updates = int(shard.metadata()[_UPDATES])

    def __enter__(self) -> StoredState:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, slot: str, parameter: str) -> Tensor:
        """This rank's part of one tensor, fp32."""
        name, rule = f"{slot}/{parameter}", self._rules[parameter]
        return reshard(
            lambda each: self._shards[each, name].get_tensor(name), rule, self._there, self._rank, self._size
        )
