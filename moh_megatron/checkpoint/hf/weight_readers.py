"""Where a conversion gets its tensors from: one of them, or some rows of one, at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moh_megatron.checkpoint import weights
from moh_megatron.checkpoint.hf.finite import check_finite
from moh_megatron.checkpoint.hf.hf_reader import HFWeights
from moh_megatron.checkpoint.hf.safetensors_stream import SafetensorsFile, Scratch
from moh_megatron.checkpoint.hf.streaming import gather, runs, shard_shape
from moh_megatron.checkpoint.mapping import Rule, check_names_and_shapes, merge_shards, rules
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError


class WeightSource(Protocol):
    """Whole tensors of a model, heads in physical order. What a call gives is lost at the next one."""

    def dtype(self, rule: Rule) -> torch.dtype: ...

    def rows(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        """Rows of a stacked tensor, in one or more pieces."""
        ...

    def whole(self, rule: Rule) -> Tensor: ...


class HeldWeights:
    """Tensors in memory, under Megatron-core's names.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape than ``config`` gives it.
    """

    def __init__(self, state: Mapping[str, Tensor], config: Config) -> None:
        shapes = {rule.megatron: rule.shape for rule in rules(config)}
        check_names_and_shapes(state, shapes, "Megatron-core weights")
        self._state = state

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._state[rule.megatron].dtype

    def rows(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        yield self._state[rule.megatron][start:stop]

    def whole(self, rule: Rule) -> Tensor:
        return self._state[rule.megatron]


class CheckpointWeights:
    """The weights of a checkpoint, whatever tensor-parallel size wrote it; see ``open_checkpoint``."""

    def __init__(self, shards: list[SafetensorsFile]) -> None:
        self._shards, self._scratch = shards, Scratch()

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._shards[0].entries[rule.megatron].dtype

    def rows(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        self._scratch.reset()

        def read(rank: int, first: int, end: int) -> Tensor:
            return self._shards[rank].rows(rule.megatron, first, end, self._scratch)

        yield from gather(rule, start, stop, len(self._shards), read)

    def whole(self, rule: Rule) -> Tensor:
        self._scratch.reset()
        needed = self._shards if rule.dim is not None else self._shards[:1]
        return merge_shards([each.read(rule.megatron, self._scratch) for each in needed], rule.dim, rule.stride)


@contextmanager
def open_checkpoint(folder: Path, config: Config) -> Iterator[CheckpointWeights]:
    """The weights of the checkpoint ``folder``, written with ``config``.

    Raises:
        UserError: a file is broken, or a tensor is missing, unexpected, or of another shape than ``config`` gives it.
    """
    world, table = config.parallel.tensor, rules(config)
    with ExitStack() as stack:
        shards = []
        for rank in range(world):
            shards.append(SafetensorsFile(weights.shard_file(folder, rank, world)))
            stack.callback(shards[-1].close)
            shapes = {rule.megatron: shard_shape(rule, world) for rule in table}
            check_names_and_shapes(shards[-1].entries, shapes, str(shards[-1].path))
        yield CheckpointWeights(shards)


class HFSource:
    """The weights of a Hugging Face folder as a ``WeightSource``, and tensors that it lacks.

    Every call raises UserError for a tensor that is not finite, or cut short.

    Args:
        added: under Hugging Face's names.
    """

    def __init__(self, weights: HFWeights, added: Mapping[str, Tensor]) -> None:
        self._weights, self._added, self._scratch = weights, added, Scratch()

    def dtype(self, rule: Rule) -> torch.dtype:
        """Raises UserError where parts of one tensor have several."""
        held = self._added if rule.hf[0] in self._added else self._weights.entries
        found = {name: held[name].dtype for name in rule.hf}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name}: {dtype}" for name, dtype in found.items())
            raise UserError(f"{self._weights.folder}: these tensors must have the same dtype. Got {listed}.")
        return found[rule.hf[0]]

    def rows(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        """See ``WeightSource``."""
        self._scratch.reset()
        while start < stop:
            part, first = divmod(start, rule.rows)
            if part == len(rule.hf):
                yield torch.zeros(stop - start, *rule.shape[1:], dtype=self.dtype(rule))
                return
            end = min(rule.rows, first + stop - start)
            yield self._checked(rule.hf[part], first, end)
            start += end - first

    def whole(self, rule: Rule) -> Tensor:
        """See ``WeightSource``."""
        self._scratch.reset()
        return rule.join([self._checked(name, 0, self._weights.entries[name].shape[0]) for name in rule.hf])

    def _checked(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._added:
            return self._added[name][start:stop]
        rows = self._weights.rows(name, start, stop, self._scratch)
        check_finite(rows, self._weights.location(name))
        return rows


def pieces(source: WeightSource, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(Megatron-core's name, rows) of every whole tensor, in the table's order; see ``write_checkpoint``."""
    for rule in rules(config):
        if not rule.stacked:
            yield rule.megatron, source.whole(rule)
            continue
        for start, stop in runs(rule.shape[0], row_bytes(rule, source.dtype(rule))):
            for piece in source.rows(rule, start, stop):
                yield rule.megatron, piece


def row_bytes(rule: Rule, dtype: torch.dtype) -> int:
    """What a row of a tensor takes."""
    return torch.Size(rule.shape[1:]).numel() * dtype.itemsize
