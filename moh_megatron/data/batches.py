"""Which rank reads which samples, at which step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moh_megatron.data.dataset import Sequences


def train_batches(
    dataset: Sequences,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    start_step: int,
    end_step: int,
) -> Iterator[list[Tensor]]:
    """For each step in [start_step, end_step) this rank's micro-batches, int64 tokens [B, S+1], B = micro_batch_size.

    Row i of micro-batch m is sample step * global_batch_size + (m * data_parallel_size + rank) * B + i: the samples of
    a step do not depend on how many ranks share them, nor on the step the run was resumed at.
    """
    together = micro_batch_size * data_parallel_size
    assert global_batch_size % together == 0, (global_batch_size, micro_batch_size, data_parallel_size)
    assert end_step * global_batch_size <= len(dataset), (end_step, global_batch_size, len(dataset))
    for step in range(start_step, end_step):
        shares = micro_batch_samples(step, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size)
        yield [_stack(dataset, share) for share in shares]


def micro_batch_samples(
    step: int, global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[range]:
    """The samples of each micro-batch of one rank, for step number ``step`` (0 for the first)."""
    firsts = range(
        step * global_batch_size + data_parallel_rank * micro_batch_size,
        (step + 1) * global_batch_size,
        micro_batch_size * data_parallel_size,
    )
    return [range(first, first + micro_batch_size) for first in firsts]


@dataclass(frozen=True)
class ValidationBatch:
    tokens: Tensor
    """int64 [B, S+1]"""
    samples: int
    """How many of the rows count, from the first; the rest only fill the batch."""


def validation_batches(
    dataset: Sequences, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[ValidationBatch]:
    """One pass: each sample counts on exactly one rank, and every rank gets equally many batches of one shape.

    So the ranks can meet in the collectives of a sharded model, though the last batches may hold nothing to count.
    """
    together = micro_batch_size * data_parallel_size
    for start in range(0, len(dataset), together):
        first = start + data_parallel_rank * micro_batch_size
        samples = max(0, min(micro_batch_size, len(dataset) - first))
        indices = [*range(first, first + samples), *[0] * (micro_batch_size - samples)]
        yield ValidationBatch(_stack(dataset, indices), samples)


def _stack(dataset: Sequences, indices: range | list[int]) -> Tensor:
    return torch.stack([dataset[index] for index in indices])
