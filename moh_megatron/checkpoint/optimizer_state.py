"""Writes and reads optimizer state by parameter name, independent of parallelism and ZeRO stage.

Every tensor has its parameter's shape and is called ``slot/parameter``, such as ``exp_avg/output_layer.weight``. The
tensors of one tensor-parallel rank are distributed over its data-parallel ranks, which write a safetensors file each.

DeepSpeed's own files follow its partitions instead. Its universal checkpoints undo that, but support neither stage 0
nor a change between stage 3 and the others, nor tensor-parallel shards at stage 3: see docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moh_megatron.checkpoint.manifest import OPTIMIZER
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.checkpoint.weights import reshard
from moh_megatron.config.schema import Config

FOLDER = OPTIMIZER
_UPDATES = "updates"


def shard(tensors: Iterable[tuple[str, Tensor]], rank: int, size: int) -> dict[str, Tensor]:
    """Host copies of the tensors that data-parallel ``rank`` of ``size`` writes.

    Each tensor goes to the rank with the fewest bytes so far. Every rank iterates over all of ``tensors``, because
    making one may need all ranks.
    """
    loads, own = [0] * size, {}
    for name, tensor in tensors:
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            own[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return own


def write_shard(
    folder: Path, tensors: Mapping[str, Tensor], updates: int, coordinates: tuple[int, int, int, int]
) -> Path:
    """Write what ``shard`` returned on one rank into the folder ``FOLDER`` of ``folder``; returns the file.

    Args:
        updates: how many times the optimizer has updated the weights.
        coordinates: tensor-parallel rank and size, data-parallel rank and size.
    """
    name = "tp_rank_{:02d}_of_{:02d}.dp_rank_{:04d}_of_{:04d}.safetensors".format(*coordinates)
    path = folder / FOLDER / name
    save_file(dict(tensors), path, {_UPDATES: str(updates)})
    return path


class StoredState:
    """Reads the optimizer state of a checkpoint for one tensor-parallel rank; a context manager.

    Args:
        written_by: the configuration of the checkpoint ``folder``, which may be of another tensor-parallel size.
        rank, size: the rank that reads, and how many there are.
    """

    def __init__(self, folder: Path, written_by: Config, rank: int, size: int) -> None:
        self._rank, self._size, self._saved_size = rank, size, written_by.parallel.tensor
        self._rules = {rule.megatron: rule for rule in rules(written_by)}
        self._files: dict[tuple[int, str], Any] = {}
        self._stack = ExitStack()
        self.updates = 0
        """How many times the optimizer had updated the weights."""
        for saved_rank in [rank] if size == self._saved_size else range(self._saved_size):
            for path in sorted((folder / FOLDER).glob(f"tp_rank_{saved_rank:02d}_of_*")):
                file = self._stack.enter_context(safe_open(path, "pt"))
                self._files |= {(saved_rank, name): file for name in file.keys()}  # noqa: SIM118
                self.updates = int(file.metadata()[_UPDATES])

    def __enter__(self) -> StoredState:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, slot: str, parameter: str) -> Tensor:
        """This rank's shard of one tensor, fp32."""
        name, rule = f"{slot}/{parameter}", self._rules[parameter]
        return reshard(
            lambda saved_rank: self._files[saved_rank, name].get_tensor(name),
            rule,
            self._saved_size,
            self._rank,
            self._size,
        )
