"""The autograd function around a sparse kernel: gathers the active queries, calls the kernel, scatters its output.

Legend: S sequence, B batch, N query heads, G KV groups, H head size, M active (token, head) pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moh_megatron.moh.backends.ragged import RaggedQueries, ragged_queries


class KernelInputs(NamedTuple):
    """What a kernel reads: the active queries, and the keys and values of each list."""

    q: Tensor
    """[M, H]"""
    k: Tensor
    """[B * G, S, H]"""
    v: Tensor
    """[B * G, S, H]"""
    ragged: RaggedQueries
    scale: float
    """Factor of the scores."""


class Kernel(Protocol):
    """The part of a sparse backend that computes. All tensors are contiguous and have its ``precision``."""

    def precision(self, inputs: torch.dtype) -> torch.dtype:
        """The type its tensors must have, given that of the inputs."""
        ...

    def forward(self, lists: KernelInputs) -> tuple[Tensor, Tensor | None]:
        """The output [M, H] of the active queries, and one more tensor that the backward pass needs, or None."""
        ...

    def backward(self, lists: KernelInputs, d_out: Tensor, out: Tensor, saved: Tensor | None) -> tuple[Tensor, ...]:
        """Gradients of q [M, H], k and v [B * G, S, H], from ``forward``'s output and its gradient."""
        ...


def _gather(x: Tensor, ragged: RaggedQueries, dtype: torch.dtype) -> Tensor:
    """[S, B, N, H] -> [M, H]: the active pairs."""
    return x.reshape(-1, x.shape[-1]).index_select(0, ragged.flat).to(dtype)


def _to_lists(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[S, B, G, H] -> [B * G, S, H], contiguous."""
    return x.permute(1, 2, 0, 3).to(dtype).contiguous().flatten(0, 1)


def _from_lists(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``_to_lists``, in the precision of ``like`` [S, B, G, H]."""
    return x.view(like.shape[1], like.shape[2], like.shape[0], -1).permute(2, 0, 1, 3).to(like.dtype)


def _scatter(values: Tensor, ragged: RaggedQueries, like: Tensor) -> Tensor:
    """[M, H] -> [S, B, N, H], zero where inactive."""
    full_tensor = torch.zeros_like(like, memory_format=torch.contiguous_format)
    full_tensor.view(-1, like.shape[-1]).index_copy_(0, ragged.flat, values.to(like.dtype))
    return full_tensor


def _lists(q: Tensor, k: Tensor, v: Tensor, ragged: RaggedQueries, scale: float, dtype: torch.dtype) -> KernelInputs:
    return KernelInputs(_gather(q, ragged, dtype), _to_lists(k, dtype), _to_lists(v, dtype), ragged, scale)


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
        out, saved = kernel.forward(_lists(q, k, v, ctx.ragged, scale, kernel.precision(q.dtype)))
        ctx.save_for_backward(q, k, v, out, saved)
        return _scatter(out, ctx.ragged, q)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, saved = ctx.saved_tensors
        # The queries are gathered again: keeping them would double their memory and save little time.
        lists = _lists(q, k, v, ctx.ragged, ctx.scale, ctx.kernel.precision(q.dtype))
        d_out = _gather(gradients[0], ctx.ragged, lists.q.dtype)
        d_q, d_k, d_v = ctx.kernel.backward(lists, d_out, out, saved)
        return _scatter(d_q, ctx.ragged, q), _from_lists(d_k, k), _from_lists(d_v, v), None, None, None, None


def ragged_attention(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, active: Tensor, scale: float | None, cu_seqlens: Tensor | None
) -> Tensor:
    """``dense.masked_attention`` to rounding, computed by ``kernel`` only where ``active`` [S, B, N] is true."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _RaggedAttention.apply(q, k, v, active, scale, cu_seqlens, kernel)  # type: ignore[return-value]
