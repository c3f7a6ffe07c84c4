"""Only the active queries, in plain PyTorch, on any device.

Blocks of a ragged list (see ``ragged.py``) are multiplied against the keys and values they share. The backward pass
computes the probabilities again, so nothing larger than a block times S is ever held.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moh_megatron.moh.backends.ragged import Block
from moh_megatron.moh.backends.ragged_function import Lists
from moh_megatron.moh.precision import at_least_fp32

# Measured: the block that pays most with several query heads to a KV group, and with one.
_BLOCK_MERGED, _BLOCK_SINGLE = 256, 128


class _Blocks:
    """Scores of one block after another, in buffers that all of them share."""

    def __init__(self, lists: Lists) -> None:
        keys = lists.k.shape[1]
        self._ragged = lists.ragged
        self.size = _BLOCK_MERGED if lists.ragged.width > 1 else _BLOCK_SINGLE
        self._buffers = lists.q.new_empty(2, self.size * keys)
        self._key_index = torch.arange(keys, device=lists.q.device)

    def buffer(self, which: int, block: Block) -> Tensor:
        rows, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
        return self._buffers[which, : rows * keys].view(rows, keys)

    def probabilities(self, q: Tensor, k: Tensor, block: Block) -> Tensor:
        """Softmax of the block's queries [rows, H] against the keys [S, H] each of them may see."""
        scores = torch.mm(q[block.rows], k[block.keys].t(), out=self.buffer(0, block))
        self._hide(scores, block)
        return torch.softmax(scores, -1, out=scores)

    def _hide(self, scores: Tensor, block: Block) -> None:
        last, first = self._ragged.last_key[block.rows], self._ragged.first_key[block.rows]
        start = block.keys.start
        # All rows see the keys from the latest document start to the earliest position: only the ends differ.
        seen_by_all = max(block.lowest_last + 1 - start, 0)
        scores[:, seen_by_all:].masked_fill_(
            self._key_index[start + seen_by_all : block.keys.stop] > last[:, None], -math.inf
        )
        if block.highest_first > start:
            head = self._key_index[start : block.highest_first]
            scores[:, : head.numel()].masked_fill_(head < first[:, None], -math.inf)


class GatheredKernel:
    """Matrix products of blocks; see ``ragged_function.Kernel``."""

    precision = staticmethod(at_least_fp32)

    def forward(self, lists: Lists) -> tuple[Tensor, None]:
        blocks, rows, q = _Blocks(lists), torch.empty_like(lists.q), lists.q * lists.scale
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            for block in lists.ragged.blocks(index, blocks.size):
                torch.mm(blocks.probabilities(q, key, block), value[block.keys], out=rows[block.rows])
        return rows, None

    def backward(self, lists: Lists, d_rows: Tensor, rows: Tensor, extra: Tensor | None) -> tuple[Tensor, ...]:
        blocks, q = _Blocks(lists), lists.q * lists.scale
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(lists.k), torch.zeros_like(lists.v)
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            for block in lists.ragged.blocks(index, blocks.size):
                probability, d_out = blocks.probabilities(q, key, block), d_rows[block.rows]
                d_v[index, block.keys].addmm_(probability.t(), d_out)
                d_scores = torch.mm(d_out, value[block.keys].t(), out=blocks.buffer(1, block))
                softmax_backward = torch.ops.aten._softmax_backward_data.out
                softmax_backward(d_scores, probability, -1, d_scores.dtype, grad_input=d_scores)
                torch.mm(d_scores, key[block.keys], out=d_q[block.rows])
                d_k[index, block.keys].addmm_(d_scores.t(), q[block.rows])
        return d_q.mul_(lists.scale), d_k, d_v
