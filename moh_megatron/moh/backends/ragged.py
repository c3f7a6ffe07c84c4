"""The active (token, head) pairs of a batch as ragged lists, one for each batch row and KV group.

All query heads of a KV group read the same keys and values, so their active queries are merged into one list, sorted
by position: a block of it meets one contiguous range of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moh_megatron.moh.backends.document_starts import document_starts


class Block(NamedTuple):
    """Consecutive rows of one list and the keys any of them may see."""

    rows: slice
    keys: slice
    lowest_last: int
    """The last key every row sees, documents aside."""
    highest_first: int
    """The first key every row sees."""


@dataclass(frozen=True)
class RaggedQueries:
    """M active pairs, list after list: batch row by batch row, KV group by KV group, position by position."""

    flat: Tensor
    """[M] index into the pairs (S, B, N)."""
    first_key: Tensor
    """[M] the first key a pair sees: where its document starts."""
    last_key: Tensor
    """[M] the last key a pair sees: its position."""
    bounds: list[int]
    """[B * G + 1] where each list starts in the three tensors above."""
    width: int
    """Query heads to a KV group."""

    def blocks(self, index: int, size: int) -> Iterator[Block]:
        """List ``index`` cut into blocks of at most ``size`` rows."""
        begin, end = self.bounds[index], self.bounds[index + 1]
        starts = list(range(begin, end, size))
        ends = [*starts[1:], end][: len(starts)]
        corners = self.flat.new_tensor([starts, [stop - 1 for stop in ends]])
        (low, high), (lowest, last) = self.first_key[corners].tolist(), self.last_key[corners].tolist()
        for place, rows in enumerate(map(slice, starts, ends)):
            yield Block(rows, slice(low[place], last[place] + 1), lowest[place], high[place])


def ragged_queries(active: Tensor, groups: int, cu_seqlens: Tensor | None = None) -> RaggedQueries:
    """Collect the true entries of ``active`` [S, B, N] for ``groups`` KV groups."""
    length, batch, heads = active.shape
    width = heads // groups
    by_list = active.reshape(length, batch, groups, width).permute(1, 2, 0, 3)
    which, place = by_list.reshape(batch * groups, length * width).nonzero().unbind(1)
    position = place // width
    head = (which % groups) * width + place % width
    flat = (position * batch + which // groups) * heads + head
    counts = torch.bincount(which, minlength=batch * groups)
    starts = document_starts(cu_seqlens, length, active.device)
    return RaggedQueries(flat, starts[position], position, [0, *counts.cumsum(0).tolist()], width)
