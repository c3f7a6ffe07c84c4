"""Autograd around a kernel that works on ragged lists of active queries: gather rows, call it, put rows back."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moh_megatron.moh.backends.ragged import RaggedQueries, ragged_queries


class Lists(NamedTuple):
    """M active queries and the keys and values of each list."""

    q: Tensor
    """[M, H]"""
    k: Tensor
    """[B * G, S, H]"""
    v: Tensor
    """[B * G, S, H]"""
    ragged: RaggedQueries
    scale: float
    """Of the scores."""


class Kernel(Protocol):
    """What a backend computes. All tensors are contiguous, in the precision the kernel asks for."""

    def precision(self, inputs: torch.dtype) -> torch.dtype:
        """The precision in which it takes its tensors, given that of the inputs."""
        ...

    def forward(self, lists: Lists) -> tuple[Tensor, Tensor | None]:
        """The rows [M, H] of the output, and what the backward pass wants besides them."""
        ...

    def backward(self, lists: Lists, d_rows: Tensor, rows: Tensor, extra: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of q [M, H], k and v [B * G, S, H]."""
        ...


def _rows(x: Tensor, ragged: RaggedQueries, dtype: torch.dtype) -> Tensor:
    """[S, B, N, H] -> [M, H]: the active rows."""
    return x.reshape(-1, x.shape[-1]).index_select(0, ragged.flat).to(dtype)


def _keys_by_list(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, B, G, H] -> [B * G, S, H], contiguous."""
    return x.permute(1, 2, 0, 3).to(dtype).contiguous().flatten(0, 1)


def _keys_of_lists(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_keys_by_list``, in the precision of ``like`` [S, B, G, H]."""
    return x.view(like.shape[1], like.shape[2], like.shape[0], -1).permute(2, 0, 1, 3).to(like.dtype)


def _scatter(rows: Tensor, ragged: RaggedQueries, like: Tensor) -> Tensor:
    """[M, H] -> [S, B, N, H], zero where inactive."""
    whole = torch.zeros_like(like, memory_format=torch.contiguous_format)
    whole.view(-1, like.shape[-1]).index_copy_(0, ragged.flat, rows.to(like.dtype))
    return whole


def _lists(q: Tensor, k: Tensor, v: Tensor, ragged: RaggedQueries, scale: float, dtype: torch.dtype) -> Lists:
    return Lists(_rows(q, ragged, dtype), _keys_by_list(k, dtype), _keys_by_list(v, dtype), ragged, scale)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        active: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
        kernel: Kernel,
    ) -> Tensor:
        ctx.ragged, ctx.scale, ctx.kernel = ragged_queries(active, k.shape[2], cu_seqlens), scale, kernel
        rows, extra = kernel.forward(_lists(q, k, v, ctx.ragged, scale, kernel.precision(q.dtype)))
        ctx.save_for_backward(q, k, v, rows, extra)
        return _scatter(rows, ctx.ragged, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, rows, extra = ctx.saved_tensors
        # Gathered again rather than kept: twice the memory of the queries buys little time.
        lists = _lists(q, k, v, ctx.ragged, ctx.scale, ctx.kernel.precision(q.dtype))
        d_rows = _rows(gradients[0], ctx.ragged, lists.q.dtype)
        d_q, d_k, d_v = ctx.kernel.backward(lists, d_rows, rows, extra)
        return _scatter(d_q, ctx.ragged, q), _keys_of_lists(d_k, k), _keys_of_lists(d_v, v), None, None, None, None


def ragged_attention(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, active: Tensor, scale: float | None, cu_seqlens: Tensor | None
) -> Tensor:
    """As ``dense.dense_attention``, to rounding, computing only what ``active`` [S, B, N] asks for."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _RaggedAttention.apply(q, k, v, active, scale, cu_seqlens, kernel)  # type: ignore[return-value]
