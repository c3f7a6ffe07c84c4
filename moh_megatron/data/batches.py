"""Yields the batches of each data-parallel rank, for training and for validation."""

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
    """This rank's micro-batches of each step in [start_step, end_step): int64 tokens [B, S+1], B = micro_batch_size.

    Row i of micro-batch m is sample step * global_batch_size + (m * data_parallel_size + rank) * B + i: the samples of
    a step do not depend on how many ranks share them, nor on the step the run was resumed at.
    """
    samples_at_once = micro_batch_size * data_parallel_size
    assert global_batch_size % samples_at_once == 0, (global_batch_size, micro_batch_size, data_parallel_size)
    assert end_step * global_batch_size <= len(dataset), (end_step, global_batch_size, len(dataset))
    for step in range(start_step, end_step):
        micro_batches = micro_batch_samples(
            step, global_batch_size, micro_batch_size, data_parallel_rank, data_parallel_size
        )
        yield [_stack(dataset, indices) for indices in micro_batches]


def micro_batch_samples(
    step: int, global_batch_size: int, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> list[range]:
    """The indices of the samples in each micro-batch of one rank at ``step``, which counts from 0."""
    starts = range(
        step * global_batch_size + data_parallel_rank * micro_batch_size,
        (step + 1) * global_batch_size,
        micro_batch_size * data_parallel_size,
    )
    return [range(start, start + micro_batch_size) for start in starts]


@dataclass(frozen=True)
class ValidationBatch:
    """A batch of which only the first rows may count."""

    tokens: Tensor
    """int64 [B, S+1]"""
    samples: int
    """How many rows count, from the first on; the others only fill the batch."""


def validation_batches(
    dataset: Sequences, *, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[ValidationBatch]:
    """One pass over the dataset, in which each sample counts on exactly one rank.

    Every rank gets the same number of batches of the same shape, so that all take part in the collectives of a sharded
    model; in the last batches nothing may count.
    """
    for start in range(0, len(dataset), micro_batch_size * data_parallel_size):
        first = start + data_parallel_rank * micro_batch_size
        samples = max(0, min(micro_batch_size, len(dataset) - first))
        indices = [*range(first, first + samples), *[0] * (micro_batch_size - samples)]
        yield ValidationBatch(_stack(dataset, indices), samples)


def _stack(dataset: Sequences, indices: range | list[int]) -> Tensor:
    return torch.stack([dataset[index] for index in indices])
