"""Whole tensors a run of rows at a time, dealt to tensor-parallel ranks and gathered from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moh_megatron.checkpoint.mapping import Rule

PIECE_BYTES = 1 << 22
"""What is held at once of a tensor that can be taken in pieces: small enough to stay in a processor's cache."""


@contextmanager
def one_thread() -> Iterator[None]:
    """torch works in the calling thread alone: between pieces this small its helpers would spin on the cores that hash
    and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def runs(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows, about PIECE_BYTES each."""
    step = max(1, PIECE_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def deal(rule: Rule, start: int, piece: Tensor, world: int) -> Iterator[tuple[int, Tensor]]:
    """(rank, its part) of the rows from ``start`` on of a whole tensor, in the order of each rank's own rows."""
    if rule.dim is None:
        yield from ((rank, piece) for rank in range(world))
    elif rule.dim == 1:
        yield from enumerate(piece.chunk(world, 1))
    else:
        share, row, stop = rule.shape[0] // (rule.stride * world), start, start + len(piece)
        while row < stop:
            end = min((row // share + 1) * share, stop)
            yield row // share % world, piece[row - start : end - start]
            row = end


def gather(rule: Rule, start: int, stop: int, world: int, read: Callable[[int, int, int], Tensor]) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` of a whole tensor, in pieces; ``read(rank, first, end)`` gives a rank's own rows."""
    if rule.dim is None:
        yield read(0, start, stop)
    elif rule.dim == 1:
        parts = [read(rank, start, stop) for rank in range(world)]
        yield torch.cat(parts, 1) if world > 1 else parts[0]
    else:
        share, row = rule.shape[0] // (rule.stride * world), start
        while row < stop:
            block, end = row // share, min((row // share + 1) * share, stop)
            first = block // world * share + row % share
            yield read(block % world, first, first + end - row)
            row = end


def shard_shape(rule: Rule, world: int) -> tuple[int, ...]:
    """What one of ``world`` ranks holds of a tensor."""
    if rule.dim is None:
        return rule.shape
    shape = list(rule.shape)
    shape[rule.dim] //= world
    return tuple(shape)
