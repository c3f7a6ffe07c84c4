"""The routers' auxiliary losses, and the autograd function that adds them to the total loss inside a layer."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

BalanceForm = Literal["scaled", "paper"]


def balance_loss(probability: Tensor, load: Tensor, form: BalanceForm, groups: int = 1) -> Tensor:
    """Load balance over the routed heads (paper, eq. 7): sum_i P_i f_i; with routing groups, the mean over them.

    ``probability`` P [n_routed] is the mean routing probability, ``load`` f [n_routed] the fraction of tokens that
    chose each head, both within the head's group, group by group. The gradient flows through P only. ``scaled``
    multiplies by the routed heads of a group, as the official code does. Raises ValueError for another ``form``.
    """
    if form not in get_args(BalanceForm):
        raise ValueError(f"balance must be one of {', '.join(get_args(BalanceForm))}. Got {form!r}.")
    loss = (probability * load.detach()).sum() / groups
    return loss * (probability.numel() // groups) if form == "scaled" else loss


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits [..., E])^2; keeps a router's logits small (arXiv 2202.08906, eq. 5).

    With logits [..., groups, E / groups] it is the mean over tokens and groups.
    """
    return logits.logsumexp(-1).square().mean()


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.loss_like, ctx.weight = loss, weight
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], torch.full_like(ctx.loss_like, ctx.weight), None


def attach_loss(tensor: Tensor, loss: Tensor, weight: float) -> Tensor:
    """``tensor`` unchanged; its backward pass also gives ``loss`` the gradient ``weight``.

    The gradients are those of a total loss that contains weight * loss, in every layer and under recomputation.
    ``weight`` must include every factor of the main loss before its backward pass (1 / accumulation steps).
    """
    return _AttachLoss.apply(tensor, loss, weight)  # type: ignore[return-value]
