"""What changes in the routers from step to step, beside their weights: biases, and how many heads are active."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from moh_megatron.moh.attention import MoHSelfAttention


def update_biases(layers: Sequence[MoHSelfAttention], counts: Tensor, dp_group: dist.ProcessGroup) -> None:
    """Balance without a loss (arXiv 2408.15664, algorithm 1): after a step, move each routed head's bias by
    ``moh.bias_update_rate`` up where fewer tokens than the mean used the head, down where more did.

    ``counts`` [L, N] are this rank's tokens of the step; the load is theirs over all data-parallel ranks. Nothing is
    done, or communicated, where a loss balances. The source adds its biases to a sigmoid's outputs, we to the scores.
    """
    if all(layer.router.bias_steps is None for layer in layers):
        return
    counts = counts.clone()
    dist.all_reduce(counts, group=dp_group)
    for layer, of_layer in zip(layers, counts, strict=True):
        layer.router.update_bias(of_layer)


def follow_schedule(layers: Sequence[MoHSelfAttention], step: int) -> None:
    """Let every router choose as many heads as ``moh.activation_schedule_steps`` has after ``step`` steps."""
    for layer in layers:
        layer.router.follow_schedule(step)
