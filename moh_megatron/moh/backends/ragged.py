"""Collects the active (token, head) pairs of a batch in ragged lists, one for each batch row and KV group.

All query heads of a KV group read the same keys and values, so their active queries are merged into one list, sorted
by position: a block of a list then needs one contiguous range of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Consecutive entries (rows) of one list, and the keys that any of them may see."""

    rows: slice
    keys: slice
    lowest_last: int
    """The smallest last key of the rows: no row sees fewer keys at the end."""
    highest_first: int
    """The largest first key of the rows: every row sees it, and no row sees fewer keys at the start."""


@dataclass(frozen=True)
class RaggedQueries:
    """M active pairs: the lists one after another, ordered by batch row, KV group and position."""

    flat: Tensor
    """[M] flat index of a pair in [S, B, N]."""
    first_key: Tensor
    """[M] the first key a pair sees: the start of its document."""
    last_key: Tensor
    """[M] the last key a pair sees: its position."""
    bounds: list[int]
    """[B * G + 1] start of each list in the three tensors above, and the end of the last."""
    width: int
    """Query heads in a KV group."""

    def blocks(self, index: int, size: int) -> Iterator[Block]:
        """List ``index`` in blocks of at most ``size`` rows."""
        begin, end = self.bounds[index], self.bounds[index + 1]
        starts = list(range(begin, end, size))
        ends = [*starts[1:], end][: len(starts)]
        corners = self.flat.new_tensor([starts, [stop - 1 for stop in ends]])
        (low, high), (lowest, last) = self.first_key[corners].tolist(), self.last_key[corners].tolist()
        for number, rows in enumerate(map(slice, starts, ends)):
            yield Block(rows, slice(low[number], last[number] + 1), lowest[number], high[number])


def ragged_queries(active: Tensor, groups: int, cu_seqlens: Tensor | None = None) -> RaggedQueries:
    """Collect the true entries of ``active`` [S, B, N] for ``groups`` KV groups."""
    length, batch, heads = active.shape
    width = heads // groups
    by_list = active.reshape(length, batch, groups, width).permute(1, 2, 0, 3)
    list_index, offset = by_list.reshape(batch * groups, length * width).nonzero().unbind(1)
    position = offset // width
    head = (list_index % groups) * width + offset % width
    flat = (position * batch + list_index // groups) * heads + head
    counts = torch.bincount(list_index, minlength=batch * groups)
    starts = _document_starts(cu_seqlens, length, active.device)
    return RaggedQueries(flat, starts[position], position, [0, *counts.cumsum(0).tolist()], width)


def _document_starts(cu_seqlens: Tensor | None, length: int, device: torch.device) -> Tensor:
    """[S] int64: the first position of the document each position belongs to; all 0 without documents."""
    if cu_seqlens is None:
        return torch.zeros(length, dtype=torch.int64, device=device)
    ends = cu_seqlens.to(device, torch.int64)
    return ends[:-1].repeat_interleave(ends.diff(), output_size=length)
