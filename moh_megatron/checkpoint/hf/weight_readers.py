"""Reads the weights that a conversion takes: full tensors, or chunks of rows, each checked to be finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from moh_megatron.checkpoint.hf.hf_reader import HFWeights
from moh_megatron.checkpoint.hf.streaming import row_ranges
from moh_megatron.checkpoint.mapping import Rule, check_names_and_shapes, rules
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.safetensors_stream import Scratch


class WeightSource(Protocol):
    """Full tensors of a model, heads in physical order, such as ``weights.StoredWeights``.

    The tensors that a call returns are overwritten by the next call.
    """

    def dtype(self, rule: Rule) -> torch.dtype: ...

    def chunks(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        """Rows ``start`` to ``stop`` of a stacked tensor, in one or more chunks."""
        ...

    def full_tensor(self, rule: Rule) -> Tensor: ...


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

    def chunks(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        yield self._state[rule.megatron][start:stop]

    def full_tensor(self, rule: Rule) -> Tensor:
        return self._state[rule.megatron]


class HFSource:
    """The weights of a Hugging Face folder as a ``WeightSource``, and tensors that it lacks.

    Every call raises UserError for a tensor that is not finite, or cut short.

    Args:
        added: tensors that the folder lacks, under Hugging Face's names.
    """

    def __init__(self, weights: HFWeights, added: Mapping[str, Tensor]) -> None:
        self._weights, self._added, self._scratch = weights, added, Scratch()

    def dtype(self, rule: Rule) -> torch.dtype:
        """Raises UserError where the Hugging Face tensors of one rule have several."""
        held = self._added if rule.hf[0] in self._added else self._weights.entries
        found = {name: held[name].dtype for name in rule.hf}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name}: {dtype}" for name, dtype in found.items())
            raise UserError(f"{self._weights.folder}: these tensors must have the same dtype. Got {listed}.")
        return found[rule.hf[0]]

    def chunks(self, rule: Rule, start: int, stop: int) -> Iterator[Tensor]:
        """See ``WeightSource``."""
        self._scratch.reset()
        while start < stop:
            index, first = divmod(start, rule.rows)
            if index == len(rule.hf):
                yield torch.zeros(stop - start, *rule.shape[1:], dtype=self.dtype(rule))
                return
            end = min(rule.rows, first + stop - start)
            yield self._checked(rule.hf[index], first, end)
            start += end - first

    def full_tensor(self, rule: Rule) -> Tensor:
        """See ``WeightSource``."""
        self._scratch.reset()
        return rule.join([self._checked(name, 0, self._weights.entries[name].shape[0]) for name in rule.hf])

    def _checked(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._added:
            return self._added[name][start:stop]
        rows = self._weights.rows(name, start, stop, self._scratch)
        check_finite(rows, self._weights.location(name))
        return rows


def all_chunks(source: WeightSource, config: Config) -> Iterator[tuple[str, Tensor]]:
    """(Megatron-core's name, rows) of every full tensor, in the table's order; see ``write_checkpoint``."""
    for rule in rules(config):
        if not rule.stacked:
            yield rule.megatron, source.full_tensor(rule)
            continue
        for start, stop in row_ranges(rule.shape[0], row_bytes(rule, source.dtype(rule))):
            for chunk in source.chunks(rule, start, stop):
                yield rule.megatron, chunk


def row_bytes(rule: Rule, dtype: torch.dtype) -> int:
    """Bytes of one row of a full tensor."""
    return torch.Size(rule.shape[1:]).numel() * dtype.itemsize


def check_finite(tensor: Tensor, name: str, before: Tensor | None = None) -> None:
    """Raise UserError where ``tensor`` is not finite; ``before`` is the tensor in its former precision."""
    # NaN and infinity show in the extremes, which are found in one pass without a copy.
    if not tensor.is_floating_point() or not tensor.numel() or all(extreme.isfinite() for extreme in tensor.aminmax()):
        return
    narrowed = before is not None and bool(before.isfinite().all())
    cause = f"too large for {tensor.dtype}: choose another dtype" if narrowed else "broken weights"
    raise UserError(f"{name}: every value must be finite. Got inf or NaN ({cause}).")


def check_not_lost(tensor: Tensor, name: str, before: Tensor) -> None:
    """Raise UserError where ``tensor`` is all zeros and ``before``, the tensor in its former precision, is not."""
    if before.any() and not tensor.any():
        raise UserError(
            f"{name}: its values, of at most {before.abs().max():.1g}, all become 0 in {tensor.dtype}: the router "
            "would rank no head above another. Choose bf16 or fp32."
        )
