"""Distillation: the KL divergence of a model's next-token distribution from a frozen model's, on sharded logits.

Legend: S sequence, B batch, V vocabulary, v this tensor-parallel rank's share of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from moh_megatron.model.build import model_arguments
from moh_megatron.parallel import groups


def log_probabilities(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of the log softmax over the full vocabulary, in fp32: logits [..., v] -> [..., v]."""
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    logits = logits - largest
    total = logits.exp().sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return logits - total.log()


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> Tensor:
        teacher_log, student_log = log_probabilities(teacher, group), log_probabilities(student, group)
        target = teacher_log.exp()
        # A padded entry's logit is minus infinity in both models: its probability is 0, the difference of logs NaN.
        divergence = (target * (teacher_log - student_log)).masked_fill(target == 0, 0.0).sum(-1)
        dist.all_reduce(divergence, group=group)
        ctx.save_for_backward(student_log.exp_().sub_(target))
        ctx.dtype = student.dtype
        return divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * gradients[0].unsqueeze(-1)).to(ctx.dtype), None, None


def divergence(student: Tensor, teacher: Tensor, group: dist.ProcessGroup) -> Tensor:
    """KL(teacher || student) of each token, in nats: two logits [..., v] -> [...], the same on every rank of ``group``.

    Only ``student`` gets a gradient; each rank gets that of its own vocabulary entries.
    """
    return _Divergence.apply(student, teacher, group)  # type: ignore[return-value]


def distilled_losses(
    model: torch.nn.Module, teacher: torch.nn.Module, tokens: Tensor, eos_token_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and divergence from ``teacher`` of each next token: tokens [B, S + 1] -> two [B, S], in nats.

    ``eos_token_id`` as in ``token_losses``.
    """
    arguments = model_arguments(tokens[:, :-1].contiguous(), eos_token_id)
    with torch.no_grad():
        teacher_logits = teacher(*arguments)
    logits = model(*arguments)
    distance = divergence(logits, teacher_logits, groups.tp_group())
    # The cross-entropy comes last: Megatron-core's overwrites the logits.
    return vocab_parallel_cross_entropy(logits, tokens[:, 1:].contiguous()), distance
