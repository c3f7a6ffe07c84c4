"""Gradient rules for what tensor-parallel ranks hold in common.

DeepSpeed drives the backward pass and knows nothing of tensor parallelism, so nobody sums the gradients of replicated
tensors over the tensor-parallel ranks afterwards; with sequence parallelism the norms' gradients were wrong by up to
75 % in a trial. Here the sum is part of the graph: each rule is an autograd function whose backward pass communicates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch import Tensor


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Megatron-core 0.16's own reduction drops the result for a gradient that is not contiguous.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity forward, sum over ``group`` backward: for a replicated tensor each rank uses a part of.

    The parts may be heads (a gate used only where its head lives) or positions (a norm's weight under sequence
    parallelism); either way a rank sees only its share of the gradient.
    """
    return tensor if group.size() == 1 else _SumGradient.apply(tensor, group)  # type: ignore[return-value]


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [S / TP, ...] -> [S, ...] forward, reduce-scatter backward (every rank uses the whole differently)."""
    return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)


def gather_last_dimension(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [..., n] -> [..., n * TP] in rank order; backward keeps this rank's part of a shared gradient."""
    return gather_from_tensor_model_parallel_region(tensor, group=group)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = group.size()
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total / ctx.size

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.size, None


def mean_over_ranks(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over ``group`` of equally weighted parts; every rank computes the same from it, so backward only scales."""
    return tensor if group.size() == 1 else _MeanOverRanks.apply(tensor, group)  # type: ignore[return-value]
