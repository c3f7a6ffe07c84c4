"""Attention where each token uses only some heads: the public function, which chooses among the backends."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from moh_megatron.moh.backends.choice import Backend, choose_backend
from moh_megatron.moh.backends.cpu import CpuKernel, kernel_library, serves
from moh_megatron.moh.backends.dense import masked_attention
from moh_megatron.moh.backends.gathered import GatheredKernel
from moh_megatron.moh.backends.ragged_function import Kernel, ragged_attention
from moh_megatron.moh.backends.slots import slot_attention, slots_in_each_group


def _triton_kernel() -> Kernel:
    from moh_megatron.moh.backends.triton_kernel import TritonKernel  # imported here: it compiles on import

    return TritonKernel()


_KERNELS: dict[Backend, Callable[[], Kernel]] = {
    "gathered": GatheredKernel,
    "cpu": CpuKernel,
    "triton": _triton_kernel,
}
_BACKENDS = ("dense", "slots", *_KERNELS)


def refusal(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``backend`` cannot compute with tensors of this type and device; None if it can."""
    if backend == "cpu" and not serves(dtype, device):
        return "backend 'cpu' needs fp32 or bf16 on the CPU."
    if backend == "triton":
        device_serves = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        if not device_serves or importlib.util.find_spec("triton") is None or dtype == torch.float64:
            return "backend 'triton' needs the triton package and fp32, bf16 or fp16 tensors on a GPU."
    return None


def _require(backend: str, q: Tensor) -> None:
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(_BACKENDS)}. Got {backend!r}.")
    if reason := refusal(backend, q.dtype, q.device):
        raise ValueError(f"{reason} Got {q.dtype} on {q.device.type}; use 'gathered' or 'auto'.")


def _check(q: Tensor, k: Tensor, v: Tensor, active: Tensor, cu_seqlens: Tensor | None) -> None:
    inputs = {"q": q, "k": k, "v": v, "active": active} | ({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens})
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor. Got {type(value).__name__}.")
        if name != "cu_seqlens" and value.device != q.device:
            raise ValueError(f"{name} must be on the device of q ({q.device}). Got {value.device}.")
        if name in ("k", "v") and value.dtype != q.dtype:
            raise ValueError(f"{name} must have the type of q ({q.dtype}). Got {value.dtype}.")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating-point numbers. Got {q.dtype}.")
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"q must have shape [S, B, N, H]. Got {list(q.shape)}.")
    length, batch, heads, size = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (length, batch, size):
        raise ValueError(f"k must have shape [S, B, G, H] = [{length}, {batch}, G, {size}]. Got {list(k.shape)}.")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {list(k.shape)}. Got {list(v.shape)}.")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"The KV groups of k must divide the {heads} heads of q. Got {k.shape[2]}.")
    if active.shape != q.shape[:3]:
        raise ValueError(f"active must have shape [S, B, N] = {list(q.shape[:3])}. Got {list(active.shape)}.")
    if active.dtype != torch.bool:
        raise ValueError(f"active must be bool. Got {active.dtype}.")
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"cu_seqlens needs B = 1: pack the documents into one row. Got B = {batch}.")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must be int32 [documents + 1]. Got {cu_seqlens.dtype} {list(cu_seqlens.shape)}.")
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
        raise ValueError(f"cu_seqlens must rise from 0 to S = {length}. Got {ends}.")


def _mean_document_length(cu_seqlens: Tensor) -> int:
    """The mean over tokens of the length of their document: sum of squared lengths over sum of lengths."""
    lengths = cu_seqlens.diff().double()
    return round(float(lengths.square().sum() / lengths.sum().clamp_min(1)))


def backend_for(q: Tensor, share: float, *, even: bool, cu_seqlens: Tensor | None) -> Backend:
    """The backend that ``auto`` means for queries [S, B, N, H]; arguments as in ``choose_backend``."""
    # On a GPU the choice does not depend on the length, and measuring it would wait for the device.
    measured = cu_seqlens is not None and q.device.type == "cpu"
    length = _mean_document_length(cu_seqlens) if measured else q.shape[0]  # type: ignore[arg-type]
    return choose_backend(length=length, share=share, dtype=q.dtype, device=q.device, even=even)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    active: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: Literal["auto", "dense", "slots", "gathered", "cpu", "triton"] = "auto",
) -> Tensor:
    """Causal softmax attention, computed only where ``active``, by the backend that is asked for or fastest.

    Args:
        q: queries [S, B, N, H].
        k, v: keys and values [S, B, G, H] of every token: a later token may use a head that earlier ones skipped.
        active: bool [S, B, N], the heads each token uses.
        scale: factor of the scores; None means 1 / sqrt(H).
        cu_seqlens: int32 [documents + 1], requires B = 1: attention stays inside each packed document.
        backend: ``dense`` computes every head and zeroes the inactive ones; ``slots`` (any device) gives the active
            heads alone to the kernel of ``dense``, where every token has the same number of them in every KV group;
            ``gathered`` (PyTorch, any device), ``cpu`` (C++, one thread; replaced by ``gathered`` where it cannot be
            compiled) and ``triton`` (CUDA) skip inactive pairs; ``auto`` uses the fastest one measured for the shape.

    Returns:
        [S, B, N, H], zero where inactive. Gradients of q, k and v are exact; a skipped head has none.

    Raises:
        ValueError: shapes or types do not agree, or the backend cannot compute with these tensors.
    """
    _check(q, k, v, active, cu_seqlens)
    slots = None
    if backend == "auto":
        # Counting would synchronise a GPU, for which the choice does not depend on the share.
        share = 1.0
        if q.device.type == "cpu":
            share = int(active.count_nonzero()) / max(active.numel(), 1)
            slots = slots_in_each_group(active, k.shape[2])
        backend = backend_for(q, share, even=slots is not None, cu_seqlens=cu_seqlens)
    else:
        _require(backend, q)
    if backend == "slots":
        slots = slots_in_each_group(active, k.shape[2]) if slots is None else slots
        if slots is None:
            raise ValueError(
                f"backend 'slots' needs the same number of active heads in each of the {k.shape[2]} KV groups of every "
                f"token. Got numbers that differ; use 'auto' or 'gathered'."
            )
        return slot_attention(q, k, v, active, slots=slots, scale=scale, cu_seqlens=cu_seqlens)
    if backend == "cpu" and kernel_library() is None:
        backend = "gathered"  # kernel_library has warned once
    if backend == "dense":
        return masked_attention(q, k, v, active, scale=scale, cu_seqlens=cu_seqlens)
    return ragged_attention(_KERNELS[backend](), q, k, v, active, scale, cu_seqlens)
