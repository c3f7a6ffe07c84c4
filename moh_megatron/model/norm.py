"""RMSNorm for Megatron-core's layer spec; its local one refuses sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moh_megatron.moh.precision import at_least_fp32
from moh_megatron.parallel import groups
from moh_megatron.parallel.gradients import sum_gradient


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, statistics in fp32 at least (Zhang & Sennrich, 2019).

    Under sequence parallelism the replicated weight meets a shard of the positions on each rank, so its gradient is
    summed over the tensor-parallel ranks.
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
