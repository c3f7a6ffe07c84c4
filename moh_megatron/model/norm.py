"""RMSNorm for Megatron-core's layer spec, whose own local RMSNorm does not support sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moh_megatron.moh.precision import at_least_fp32
from moh_megatron.parallel import groups
from moh_megatron.parallel.gradients import sum_gradient


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, with statistics in at least fp32.

    Under sequence parallelism each rank applies the replicated weight to its share of the positions, so the weight's
    gradient is summed over the tensor-parallel ranks. Source: Zhang & Sennrich, 2019.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.sequence_parallel:
            weight = sum_gradient(weight, groups.tp_group())
        normalised = F.rms_norm(x.to(at_least_fp32(x.dtype)), (x.shape[-1],), eps=self.eps)
        return normalised.to(x.dtype) * weight
