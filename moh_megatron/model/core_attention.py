"""The core attention of dense models, for Megatron-core's own SelfAttention.

Megatron-core's DotProductAttention builds its mask on the GPU and forks the GPU's random state; this one does neither.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moh_megatron.moh.backends.dense import causal_attention
from moh_megatron.moh.packed_documents import attend_packed


class CausalAttention(MegatronModule):
    """``causal_attention`` over all heads, in Megatron-core's ``core_attention`` slot."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **unused: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> Tensor:
        """query [S, B, n, H], key and value [S, B, g, H] -> [S, B, n * H]; always causal.

        ``attention_mask`` carries cu_seqlens, as in ``MoHSelfAttention``.
        """
        attention = functools.partial(causal_attention, scale=self.softmax_scale)
        return attend_packed(attention, attention_mask, query, key, value).flatten(-2)
