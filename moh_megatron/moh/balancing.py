"""Updates the routers after each step: the balancing biases, and the number of active heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from moh_megatron.moh.attention import MoHSelfAttention


def update_biases(layers: Sequence[MoHSelfAttention], counts: Tensor, dp_group: dist.ProcessGroup) -> None:
    """Balance without a loss (arXiv 2408.15664, algorithm 1).

    After a step, each routed head's bias moves by ``moh.bias_update_rate``: up if fewer tokens than the mean used the
    head, down if more did. ``counts`` [L, N] are this rank's tokens of the step; they are summed over the data-parallel
    ranks. With a balance loss the function does nothing. The source adds its biases to the outputs of a sigmoid; we
    add them to the scores.
    """
    if all(layer.router.bias_steps is None for layer in layers):
        return
    counts = counts.clone()
    dist.all_reduce(counts, group=dp_group)
    for layer, layer_counts in zip(layers, counts, strict=True):
        layer.router.update_bias(layer_counts)


def follow_schedule(layers: Sequence[MoHSelfAttention], step: int) -> None:
    """Set every router's number of routed heads to the activation schedule's after ``step`` steps."""
    for layer in layers:
        layer.router.follow_schedule(step)
