"""Computes the learning rate as a pure function of the step, so there is nothing to save or to resume."""

from __future__ import annotations

import math

from moh_megatron.config.schema import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of ``step`` (0 for the first) in a run of ``total_steps``.

    Linear warm-up from warmup_learning_rate reaches learning_rate at step warmup_steps; the last step has
    min_learning_rate, except under ``constant`` and where the warm-up leaves a single step, which has learning_rate.
    """
    peak, final, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if step < warmup:
        start = optimizer.warmup_learning_rate
        return start + (peak - start) * (step + 1) / (warmup + 1)
    if optimizer.schedule == "constant":
        return peak
    decay_start = warmup
    if optimizer.schedule == "wsd":
        decay_start = max(warmup, total_steps - 1 - math.ceil(total_steps * optimizer.decay_fraction))
        if step < decay_start:
            return peak
    progress = min(1.0, (step - decay_start) / max(1, total_steps - 1 - decay_start))
    if optimizer.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return peak + (final - peak) * progress
