"""Computes attention of the active queries in plain PyTorch, on any device.

Blocks of a ragged list (see ``ragged.py``) are multiplied by the keys and values they share. The backward pass
recomputes the probabilities, so no tensor is larger than a block times S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moh_megatron.moh.backends.ragged import Block
from moh_megatron.moh.backends.ragged_function import KernelInputs
from moh_megatron.moh.precision import at_least_fp32

# The fastest block sizes measured: with several query heads in a KV group, and with one.
_BLOCK_MERGED, _BLOCK_SINGLE = 256, 128


class _Blocks:
    """Computes the scores of one block at a time, in buffers that all blocks share."""

    def __init__(self, lists: KernelInputs) -> None:
        keys = lists.k.shape[1]
        self._ragged = lists.ragged
        self.size = _BLOCK_MERGED if lists.ragged.width > 1 else _BLOCK_SINGLE
        self._buffers = lists.q.new_empty(2, self.size * keys)
        self._key_index = torch.arange(keys, device=lists.q.device)

    def buffer(self, index: int, block: Block) -> Tensor:
        rows, keys = block.rows.stop - block.rows.start, block.keys.stop - block.keys.start
        return self._buffers[index, : rows * keys].view(rows, keys)

    def probabilities(self, q: Tensor, k: Tensor, block: Block) -> Tensor:
        """Softmax of the block's queries [rows, H] against the keys [S, H] each of them may see."""
        scores = torch.mm(q[block.rows], k[block.keys].t(), out=self.buffer(0, block))
        self._mask(scores, block)
        return torch.softmax(scores, -1, out=scores)

    def _mask(self, scores: Tensor, block: Block) -> None:
        last, first = self._ragged.last_key[block.rows], self._ragged.first_key[block.rows]
        start = block.keys.start
        # All rows see the keys from the latest document start to the earliest position; only both ends differ.
        seen_by_all = max(block.lowest_last + 1 - start, 0)
        scores[:, seen_by_all:].masked_fill_(
            self._key_index[start + seen_by_all : block.keys.stop] > last[:, None], -math.inf
        )
        if block.highest_first > start:
            head = self._key_index[start : block.highest_first]
            scores[:, : head.numel()].masked_fill_(head < first[:, None], -math.inf)


class GatheredKernel:
    """Products of blocks as a ``ragged_function.Kernel``."""

    precision = staticmethod(at_least_fp32)

    def forward(self, lists: KernelInputs) -> tuple[Tensor, None]:
        blocks, out, q = _Blocks(lists), torch.empty_like(lists.q), lists.q * lists.scale
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            for block in lists.ragged.blocks(index, blocks.size):
                torch.mm(blocks.probabilities(q, key, block), value[block.keys], out=out[block.rows])
        return out, None

    def backward(self, lists: KernelInputs, d_out: Tensor, out: Tensor, saved: Tensor | None) -> tuple[Tensor, ...]:
        blocks, q = _Blocks(lists), lists.q * lists.scale
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(lists.k), torch.zeros_like(lists.v)
        for index, (key, value) in enumerate(zip(lists.k, lists.v, strict=True)):
            for block in lists.ragged.blocks(index, blocks.size):
                probability, d_block = blocks.probabilities(q, key, block), d_out[block.rows]
                d_v[index, block.keys].addmm_(probability.t(), d_block)
                d_scores = torch.mm(d_block, value[block.keys].t(), out=blocks.buffer(1, block))
                softmax_backward = torch.ops.aten._softmax_backward_data.out
                softmax_backward(d_scores, probability, -1, d_scores.dtype, grad_input=d_scores)
                torch.mm(d_scores, key[block.keys], out=d_q[block.rows])
                d_k[index, block.keys].addmm_(d_scores.t(), q[block.rows])
        return d_q.mul_(lists.scale), d_k, d_v
