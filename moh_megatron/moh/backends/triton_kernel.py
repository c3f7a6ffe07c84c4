"""Computes attention of the active queries on CUDA GPUs, by Triton kernels.

The forward pass uses an online softmax; the backward pass uses its saved log-sum-exp. A list holds the active queries
of one KV group sorted by position (``ragged.py``); row i sees the keys FIRST[i] to LAST[i]. A program works on a block
of rows of one list, or, for the gradients of keys and values, on a block of keys. Products use the inputs' precision,
sums are fp32. The numbers are tested on a CPU in Triton's interpreter; the speed has not been measured.

Legend: M rows of all lists, L lists, S keys, H head size.
"""

# pyright cannot type values inside a kernel: they are Triton's, not Python's.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moh_megatron.moh.backends.ragged_function import KernelInputs

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NEGATIVE = tl.constexpr(-1.0e30)


def _autotuned(kernel: Any) -> Any:
    """Choose block sizes by measurement on the device; the interpreter gets one fixed choice."""
    if _INTERPRETED:
        return triton.autotune([triton.Config({"ROWS": 16, "KEYS": 16})], key=[])(kernel)
    choices = [
        triton.Config({"ROWS": rows, "KEYS": keys}, num_warps=warps, num_stages=stages)
        for rows, keys in ((64, 64), (128, 64), (64, 128))
        for warps in (4, 8)
        for stages in (2, 3)
    ]
    return triton.autotune(choices, key=["H", "S"])(kernel)


@triton.jit
def _load_rows(base, rows, columns, inside, H: tl.constexpr):
    mask = inside[:, None] & (columns < H)[None, :]
    return tl.load(base + rows[:, None] * H + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _scores(q, k, keys, first, last, inside, scale):
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None]) & inside[:, None]
    return tl.where(seen, tl.dot(q, tl.trans(k)) * scale, _NEGATIVE)


@triton.jit
def _block_of_rows(BOUNDS, FIRST, LAST, ROWS: tl.constexpr):
    """This program's rows, whether each exists, its first and last key, and the range of keys the block sees."""
    list_index = tl.program_id(1)
    begin, end = tl.load(BOUNDS + list_index), tl.load(BOUNDS + list_index + 1)
    rows = begin + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < end
    first = tl.load(FIRST + rows, mask=inside, other=2147483647)
    last = tl.load(LAST + rows, mask=inside, other=-1)
    return rows, inside, first, last, tl.min(first, 0), tl.max(last, 0) + 1


@_autotuned
@triton.jit
def _forward(
    Q, K, V, BOUNDS, FIRST, LAST, OUT, LSE, scale, S,
    H: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    rows, inside, first, last, start, stop = _block_of_rows(BOUNDS, FIRST, LAST, ROWS)
    columns = tl.arange(0, WIDE)
    q = _load_rows(Q, rows, columns, inside, H)
    base = tl.program_id(1).to(tl.int64) * S * H
    highest = tl.full([ROWS], _NEGATIVE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDE], tl.float32)
    for at in range(start, stop, KEYS):
        keys = at + tl.arange(0, KEYS)
        k = _load_rows(K + base, keys, columns, keys < S, H)
        v = _load_rows(V + base, keys, columns, keys < S, H)
        scores = _scores(q, k, keys, first, last, inside, scale)
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.where(scores > _NEGATIVE, tl.exp(scores - higher[:, None]), 0.0)
        decay = tl.exp(highest - higher)
        total = total * decay + tl.sum(p, 1)
        out = out * decay[:, None] + tl.dot(p.to(v.dtype), v)
        highest = higher
    total = tl.where(total > 0.0, total, 1.0)
    mask = inside[:, None] & (columns < H)[None, :]
    tl.store(OUT + rows[:, None] * H + columns[None, :], out / total[:, None], mask=mask)
    tl.store(LSE + rows, highest + tl.log(total), mask=inside)


@_autotuned
@triton.jit
def _backward_queries(
    D_OUT, Q, K, V, BOUNDS, FIRST, LAST, LSE, DELTA, D_Q, scale, S,
    H: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    rows, inside, first, last, start, stop = _block_of_rows(BOUNDS, FIRST, LAST, ROWS)
    columns = tl.arange(0, WIDE)
    q, d_out = _load_rows(Q, rows, columns, inside, H), _load_rows(D_OUT, rows, columns, inside, H)
    log_sum, delta = tl.load(LSE + rows, mask=inside, other=0.0), tl.load(DELTA + rows, mask=inside, other=0.0)
    base = tl.program_id(1).to(tl.int64) * S * H
    d_q = tl.zeros([ROWS, WIDE], tl.float32)
    for at in range(start, stop, KEYS):
        keys = at + tl.arange(0, KEYS)
        k = _load_rows(K + base, keys, columns, keys < S, H)
        v = _load_rows(V + base, keys, columns, keys < S, H)
        p = tl.exp(_scores(q, k, keys, first, last, inside, scale) - log_sum[:, None])
        d_scores = p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])
        d_q += tl.dot(d_scores.to(k.dtype), k)
    mask = inside[:, None] & (columns < H)[None, :]
    tl.store(D_Q + rows[:, None] * H + columns[None, :], d_q * scale, mask=mask)


@_autotuned
@triton.jit
def _backward_keys(
    D_OUT, Q, K, V, BOUNDS, FIRST, LAST, LSE, DELTA, D_K, D_V, scale, S,
    H: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    list_index = tl.program_id(1)
    begin, end = tl.load(BOUNDS + list_index), tl.load(BOUNDS + list_index + 1)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDE)
    base = list_index.to(tl.int64) * S * H
    k = _load_rows(K + base, keys, columns, keys < S, H)
    v = _load_rows(V + base, keys, columns, keys < S, H)
    d_k, d_v = tl.zeros([KEYS, WIDE], tl.float32), tl.zeros([KEYS, WIDE], tl.float32)
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        inside = rows < end
        last = tl.load(LAST + rows, mask=inside, other=-1)
        first = tl.load(FIRST + rows, mask=inside, other=2147483647)
        # Both bounds rise with the row: a block of rows that ends before these keys, or starts after them, sees none.
        if (tl.max(last, 0) >= tl.program_id(0) * KEYS) & (tl.min(first, 0) < (tl.program_id(0) + 1) * KEYS):
            q, d_out = _load_rows(Q, rows, columns, inside, H), _load_rows(D_OUT, rows, columns, inside, H)
            log_sum = tl.load(LSE + rows, mask=inside, other=0.0)
            delta = tl.load(DELTA + rows, mask=inside, other=0.0)
            p = tl.exp(_scores(q, k, keys, first, last, inside, scale) - log_sum[:, None])
            d_v += tl.dot(tl.trans(p.to(d_out.dtype)), d_out)
            d_scores = p * (tl.dot(d_out, tl.trans(v)) - delta[:, None])
            d_k += tl.dot(tl.trans(d_scores.to(q.dtype)), q)
    mask = (keys < S)[:, None] & (columns < H)[None, :]
    tl.store(D_K + base + keys[:, None] * H + columns[None, :], d_k * scale, mask=mask)
    tl.store(D_V + base + keys[:, None] * H + columns[None, :], d_v, mask=mask)


class TritonKernel:
    """The kernels above as a ``ragged_function.Kernel``."""

    def precision(self, inputs: torch.dtype) -> torch.dtype:
        """The type of the inputs: tensor cores multiply bf16."""
        return inputs

    def forward(self, lists: KernelInputs) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(lists.q)
        log_sums = torch.empty(lists.q.shape[0], dtype=torch.float32, device=out.device)
        if out.numel():
            _forward[_grid_of_rows(lists)](
                lists.q, lists.k, lists.v, *_bounds(lists), out, log_sums, lists.scale, **_sizes(lists)
            )
        return out, log_sums

    def backward(self, lists: KernelInputs, d_out: Tensor, out: Tensor, saved: Tensor | None) -> tuple[Tensor, ...]:
        assert saved is not None
        delta = (d_out.float() * out.float()).sum(-1)
        d_q = torch.empty(lists.q.shape, dtype=torch.float32, device=out.device)
        d_k, d_v = (torch.zeros(lists.k.shape, dtype=torch.float32, device=out.device) for _ in range(2))
        if out.numel():
            inputs = (d_out, lists.q, lists.k, lists.v, *_bounds(lists), saved, delta)
            _backward_queries[_grid_of_rows(lists)](*inputs, d_q, lists.scale, **_sizes(lists))
            _backward_keys[_grid_of_keys(lists)](*inputs, d_k, d_v, lists.scale, **_sizes(lists))
        return d_q, d_k, d_v


def _bounds(lists: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    ragged = lists.ragged
    return (
        torch.tensor(ragged.bounds, dtype=torch.int32, device=lists.q.device),
        ragged.first_key.int(),
        ragged.last_key.int(),
    )


def _sizes(lists: KernelInputs) -> dict[str, int]:
    size = lists.q.shape[1]
    return {"S": lists.k.shape[1], "H": size, "WIDE": max(16, triton.next_power_of_2(size))}


def _grid_of_rows(lists: KernelInputs) -> Any:
    bounds = lists.ragged.bounds
    longest = max(end - begin for begin, end in itertools.pairwise(bounds))
    return lambda settings: (triton.cdiv(longest, settings["ROWS"]), len(bounds) - 1)


def _grid_of_keys(lists: KernelInputs) -> Any:
    return lambda settings: (triton.cdiv(lists.k.shape[1], settings["KEYS"]), lists.k.shape[0])
