"""Gradient rules for tensors that are replicated over tensor-parallel ranks.

DeepSpeed drives the backward pass and does not know tensor parallelism, so it does not sum the gradients of replicated
tensors over the tensor-parallel ranks; with sequence parallelism the norms' gradients were wrong by up to 75 % in a
trial. Here the sum is part of the graph: each rule is an autograd function whose backward pass communicates.
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
        # The reduction of Megatron-core 0.16 drops the result for a gradient that is not contiguous.
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradient(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity forward, sum over ``group`` backward, for a replicated tensor of which each rank uses a part.

    The parts may be heads (a gate is used only on the rank of its head) or positions (a norm's weight under sequence
    parallelism); in both cases a rank computes only its share of the gradient.
    """
    return tensor if group.size() == 1 else _SumGradient.apply(tensor, group)  # type: ignore[return-value]


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [S / TP, ...] -> [S, ...] forward, reduce-scatter backward: ranks use the sequence differently."""
    return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)


def gather_last_dimension(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [..., n] -> [..., n * TP] in rank order forward; backward keeps this rank's slice of the gradient."""
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
    """Mean over ``group`` forward; every rank computes the same from it, so the backward pass only scales."""
    return tensor if group.size() == 1 else _MeanOverRanks.apply(tensor, group)  # type: ignore[return-value]
