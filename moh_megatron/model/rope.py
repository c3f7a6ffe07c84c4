"""RoPE's frequencies, as they are or slowed down for a longer context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moh_megatron.config.schema import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """[H / 2] fp32, radians a position: base ** (-2 i / H), scaled as ``model.rope_scaling`` says.

    llama3 follows LLaMA 3.1: of a wave that fits ``turns`` times into the original context, the part
    (turns - low) / (high - low), within 0 and 1, keeps its frequency, and the rest is slowed down by ``factor``.
    """
    size, scaling = model.head_dim, model.rope_scaling
    plain = 1.0 / model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)
