"""Mixture-of-Head attention in Megatron-core's ``self_attention`` slot.

Legend: S sequence, B batch, D hidden size, N query heads (n on this rank), G KV groups (g on this rank), H head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, assert_never, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.backends.dense import causal_attention
from moh_megatron.moh.backends.slots import Slots
from moh_megatron.moh.packed_documents import attend_packed
from moh_megatron.moh.router import LearnedRouter, QueryNormRouter, Router
from moh_megatron.moh.sparse import backend_for, sparse_attention
from moh_megatron.moh.statistics import HeadStatistics


def attend_every_head(q: Tensor, k: Tensor, v: Tensor, active: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """``causal_attention`` with the arguments of ``sparse_attention``; ``active`` is ignored.

    A skipped head has gate 0 but an output, so its gate gets a gradient (the straight-through gradient of eq. 9-10).
    """
    return causal_attention(q, k, v, cu_seqlens=cu_seqlens)


attend_slots = functools.partial(attend_packed, causal_attention)
"""Attention of the queries [S, B, G * k, H] that ``Slots`` has gathered."""


class MoHSelfAttention(SelfAttention):
    """sum_i g_i H_i W_O^i over the heads each token's router chose (paper, eq. 4-6).

    Projections, their tensor parallelism and initialisation are Megatron-core's. The forward pass is our own because
    Megatron-core's passes only queries, keys and values to the core attention, which must also know the active heads.

    Args:
        moh: the section ``moh`` of the configuration.
        heads: the heads of every layer.
        loss_scale: the factor of a layer's auxiliary losses, see ``Router``.
        from_layer: other arguments of a transformer layer to its attention; they depend on Megatron-core's version.
    """

    local_heads: Tensor
    """[n] the logical heads of this rank, in local order."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *,
        moh: MoHConfig,
        heads: Sequence[LayerHeads],
        loss_scale: float,
        **from_layer: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, **from_layer)
        layer_heads = heads[layer_number - 1]
        layout = HeadLayout(layer_heads.count, config.num_query_groups or layer_heads.count, moh.head_layout)
        local_heads = layout.local_heads(self.tp_group.rank(), self.tp_group.size())
        self.register_buffer("local_heads", torch.tensor(local_heads), persistent=False)
        self.statistics = HeadStatistics(layer_heads.count)
        self.backend = moh.fixed_backend or "auto"
        self.even = layer_heads.groups == layout.groups
        """Whether every token uses the same number of heads in every KV group."""
        attention = functools.partial(sparse_attention, backend=moh.backend)
        if moh.straight_through == "all":
            attention = attend_every_head
        self.attend = functools.partial(attend_packed, attention)
        if moh.router == "learned":
            self.router: Router = LearnedRouter(
                moh,
                layer_heads,
                loss_scale,
                hidden_size=config.hidden_size,
                init_std=moh.router_init_std or config.init_method_std,
                dtype=config.params_dtype,
                group=self.tp_group,
                sequence_parallel=config.sequence_parallel,
            )
        elif moh.router == "query_norm":
            self.router = QueryNormRouter(moh, layer_heads, loss_scale, layout=layout, group=self.tp_group)
        else:
            assert_never(moh.router)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, D] (or [S / TP, B, D] under sequence parallelism) -> the same shape, and linear_proj's bias.

        Attention is causal. ``attention_mask`` is not a mask: Megatron-core passes it on unread, so it carries
        cu_seqlens, int32 [documents + 1] over the concatenated batch rows, or None without packed documents.
        """
        cu_seqlens = attention_mask
        projected = self.get_query_key_value_tensors(hidden_states)
        q_SBnH, k_SBgH, v_SBgH = cast(tuple[Tensor, Tensor, Tensor], projected)
        routing = self.router(hidden_states, q_SBnH)
        # Full recomputation runs the layer twice, first without gradients; only the second run is counted.
        if self.training and torch.is_grad_enabled():
            self.statistics.record(routing)
        gates_SBn, active_SBn = (x.index_select(-1, self.local_heads) for x in (routing.gates, routing.active))

        if rotary_pos_emb is not None:
            q_freqs, k_freqs = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
            q_SBnH = apply_rotary_pos_emb(q_SBnH, q_freqs, config=self.config, cp_group=self.pg_collection.cp)
            k_SBgH = apply_rotary_pos_emb(k_SBgH, k_freqs, config=self.config, cp_group=self.pg_collection.cp)

        if self._uses_slots(q_SBnH, cu_seqlens):
            groups = k_SBgH.shape[2]
            slots = Slots(active_SBn, groups, self.router.active_heads // self.router.heads.groups)
            # As a view, the values would keep the fused projection in memory, the queries of all heads included.
            out_SBsH = self._attend(attend_slots, cu_seqlens, slots.take(q_SBnH), k_SBgH, v_SBgH.contiguous())
            gated = slots.put(_times(out_SBsH, slots.take(gates_SBn)))
        else:
            out_SBnH = self._attend(self.attend, cu_seqlens, q_SBnH, k_SBgH, v_SBgH, active_SBn)
            gated = _times(out_SBnH, gates_SBn)
        return self.linear_proj(gated.flatten(-2))

    def _attend(self, attend: Callable[..., Tensor], cu_seqlens: Tensor | None, *inputs: Tensor) -> Tensor:
        """``attend`` of the inputs, which are all that selective recomputation keeps."""
        if self.checkpoint_core_attention and self.training:
            return tensor_parallel.checkpoint(attend, False, cu_seqlens, *inputs)
        return attend(cu_seqlens, *inputs)

    def _uses_slots(self, q_SBnH: Tensor, cu_seqlens: Tensor | None) -> bool:
        """Whether the backend is ``slots``: asked for, or meant by ``auto``."""
        if self.backend != "auto" or not self.even:
            return self.backend == "slots"
        share = self.router.active_heads / self.router.heads.count
        return backend_for(q_SBnH, share, even=True, cu_seqlens=cu_seqlens) == "slots"


def _times(out: Tensor, gates: Tensor) -> Tensor:
    """[S, B, n, H] times [S, B, n]."""
    return out * gates.unsqueeze(-1).to(out.dtype)
