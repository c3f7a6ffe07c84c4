"""Defines a LLaMA with Mixture-of-Head attention (arXiv 2410.11842). Needs torch and transformers alone.

Legend: S sequence, B batch, D hidden size, N query heads, E routed heads, H head size, G KV groups, k slots in a group.
A router orders shared heads first, then routed ones, each kind in rising order, so group by group; it returns gates in
the order of the projections.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import maybe_autocast

from .configuration_moh import MoHConfig

SKIPPING_THRESHOLDS = {1: (1024, 0.5), 2: (512, 0.5), 4: (512, 0.75)}
"""Minimum number of query heads in a KV group -> (minimum length, maximum share of active heads) at which skipping the
inactive heads is faster. This was measured on one thread of a CPU, in fp32. It was slower on two threads of a busy
machine and in fp16; in bf16, which rounds the scores, tokens could differ; GPUs were not measured."""
CHUNK = 256
"""Queries that ``attend_active`` computes at a time."""


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest of the last dimension; ties go to the lower index (topk promises no order)."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def in_groups(values: Tensor, groups: int) -> Tensor:
    """[..., heads] -> [..., groups, heads / groups]."""
    return values.unflatten(-1, (groups, values.shape[-1] // groups))


def softmax_in_groups(logits: Tensor, groups: int) -> Tensor:
    """The softmax over each of ``groups`` parts of the last dimension."""
    return in_groups(logits, groups).softmax(-1).flatten(-2)


class Slots:
    """The k slots of each KV group, which hold the heads that a token uses, in rising order.

    The heads of a group read the same keys and values, so their queries in k slots are k ordinary query heads for every
    attention kernel. A head whose gate has vanished may give its slot to another, whose gate is 0 as well.

    Args:
        gates: [B, S, N], above 0 for at most k heads of each group.
        groups: G.
        slots: k.
    """

    def __init__(self, gates: Tensor, groups: int, slots: int):
        self.shape, self.heads = gates.shape, groups * slots
        width = gates.shape[-1] // groups
        used = in_groups((gates > 0).to(torch.uint8), groups)
        head = used.sort(dim=-1, descending=True, stable=True).indices[..., :slots]
        first_head = torch.arange(0, gates.numel(), width, device=gates.device).view(*head.shape[:-1], 1)
        self.index = (first_head + head).flatten()
        """[B * S * G * k] the flat index in [B, S, N] of each slot's head."""

    def take(self, values: Tensor) -> Tensor:
        """[B, S, N, ...] -> [B, S, G * k, ...]."""
        rows = values.flatten(0, 2).index_select(0, self.index)
        return rows.view(*self.shape[:2], self.heads, *values.shape[3:])

    def put(self, values: Tensor) -> Tensor:
        """[B, S, G * k, ...] -> [B, S, N, ...], zero where no slot is."""
        rows = values.new_zeros(self.shape.numel(), *values.shape[3:])
        return rows.index_copy(0, self.index, values.flatten(0, 2)).view(*self.shape, *values.shape[3:])


def attend_active(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scaling: float) -> Tensor:
    """Causal attention of the active (token, head) pairs alone; 0 elsewhere. For inference.

    The query heads of a KV group read the same keys: their active queries form one list in the order of positions, and
    a chunk of it attends to one range of keys.

    Args:
        query: [B, N, S, H].
        key, value: [B, KV groups, S, H].
        active: [B, S, N].

    Returns:
        [B, S, N, H].
    """
    groups, length = key.shape[1:3]
    heads_per_group = query.shape[1] // groups
    out = query.new_zeros(query.transpose(1, 2).shape)
    index = torch.arange(length, device=query.device)
    for sequence in range(query.shape[0]):
        for group in range(groups):
            heads = slice(group * heads_per_group, (group + 1) * heads_per_group)
            position, head = active[sequence, :, heads].nonzero().unbind(1)
            queries = query[sequence, heads][head, position] * scaling
            last_keys = position.tolist()
            for start in range(0, len(last_keys), CHUNK):
                chunk = slice(start, start + CHUNK)
                seen_by_all, seen = last_keys[start] + 1, last_keys[chunk][-1] + 1
                scores = (queries[chunk] @ key[sequence, group, :seen].t()).float()
                scores[:, seen_by_all:].masked_fill_(index[seen_by_all:seen] > position[chunk, None], -torch.inf)
                weights = scores.softmax(-1).to(value.dtype)
                queries[chunk] = weights @ value[sequence, group, :seen]
            out[sequence, :, heads][position, head] = queries
    return out


class MoHRouter(nn.Module):
    """Computes the gate of each head for each token, in fp32 whatever the model's precision.

    The learned router has bias-free linears ``shared`` [n_shared, D] (absent for one shared head beside routed ones),
    ``routed`` [E, D] and ``alpha`` [2, D], row 0 shared, row 1 routed (absent without shared or without routed heads).
    The query_norm router has no parameters. A model balanced by biases has ``bias_steps`` [E], integers; a step adds
    ``moh_bias_update_rate`` to the score that heads are chosen by.
    """

    bias_steps: Tensor

    def __init__(self, config: MoHConfig, layer: int):
        super().__init__()
        shared, active = config.heads_of(layer)
        order = shared + [head for head in range(config.num_attention_heads) if head not in shared]
        self.order = order
        self.inverse_order = sorted(range(len(order)), key=order.__getitem__)
        self.learned = {"learned": True, "query_norm": False}[config.moh_router]
        self.normalized = config.moh_gating == "normalized"
        self.n_shared = len(shared)
        self.n_routed = config.num_attention_heads - self.n_shared
        self.top_k = active - self.n_shared
        self.groups = config.moh_routing_groups
        self.gate_groups = self.groups if config.moh_gate_softmax == "group" else 1
        self.bias_rate = config.moh_bias_update_rate
        if self.bias_rate is not None and self.n_routed:
            self.register_buffer("bias_steps", torch.zeros(self.n_routed, dtype=torch.int64))

        def linear(present: bool, outputs: int) -> nn.Linear | None:
            return nn.Linear(config.hidden_size, outputs, bias=False) if self.learned and present else None

        self.shared = linear(self.n_shared > 1 or not self.n_routed, self.n_shared)
        self.routed = linear(self.n_routed > 0, self.n_routed)
        self.alpha = linear(self.n_shared > 0 and self.n_routed > 0, 2)

    def forward(self, hidden_states: Tensor, queries: Tensor) -> Tensor:
        """Attention input [B, S, D] and its queries before RoPE [B, S, N, H] -> gates [B, S, N], fp32."""
        with maybe_autocast(hidden_states.device.type, enabled=False):
            if self.learned:
                gates = self.learned_gates(hidden_states.float())
            else:
                gates = self.query_norm_gates(queries.float())
            return gates if self.inverse_order == list(range(len(self.order))) else gates[..., self.inverse_order]

    def chosen_heads(self, scores: Tensor) -> Tensor:
        """Scores [B, S, E] -> bool [B, S, E], True at the ``top_k`` routed heads of each token, evenly over groups."""
        if self.bias_rate is not None:
            scores = scores + self.bias_steps.float() * self.bias_rate
        return top_k_mask(in_groups(scores, self.groups), self.top_k // self.groups).flatten(-2)

    def query_norm_gates(self, queries: Tensor) -> Tensor:
        """Queries [B, S, N, H] -> gates: 1 for shared heads and the ``top_k`` routed heads of largest norm, else 0."""
        norms = torch.linalg.vector_norm(queries, dim=-1)[..., self.order]
        scores = norms[..., self.n_shared :]
        if self.bias_rate is not None:
            scores = in_groups(scores, self.groups)
            if self.groups > 1:  # As in training: nearly equal norms would lose their difference to rounding.
                scores = scores - scores.mean(-1, keepdim=True)
            deviation = scores.std(-1, keepdim=True) if scores.shape[-1] > 1 else torch.zeros_like(scores)
            scores = scores.masked_fill(deviation <= 0, 0.0) / deviation.masked_fill(deviation <= 0, 1.0)
            scores = scores.flatten(-2)
        return torch.cat([torch.ones_like(norms[..., : self.n_shared]), self.chosen_heads(scores).float()], dim=-1)

    def learned_gates(self, x: Tensor) -> Tensor:
        """Attention input [B, S, D] -> gates by eq. 5-6, or normalised, with active gates of 1 at uniform logits."""
        shared = x.new_ones(*x.shape[:-1], self.n_shared)
        if self.shared is not None:
            shared = softmax_in_groups(F.linear(x, self.shared.weight.float()), self.gate_groups)
            if self.normalized or self.routed is None:
                shared = shared * (self.n_shared // self.gate_groups)
        if self.routed is None:
            return shared
        logits = F.linear(x, self.routed.weight.float())
        chosen = self.chosen_heads(logits)
        if self.normalized:
            chosen_logits = logits.masked_fill(~chosen, -torch.inf)
            routed = self.top_k // self.gate_groups * softmax_in_groups(chosen_logits, self.gate_groups)
        else:
            routed = softmax_in_groups(logits, self.gate_groups) * chosen
        if self.alpha is None:
            return routed
        alpha = F.linear(x, self.alpha.weight.float()).softmax(-1)
        if self.normalized:
            alpha = 2 * alpha
        return torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * routed], dim=-1)


def gated(out: Tensor, gates: Tensor) -> Tensor:
    """[B, S, n, H] times [B, S, n]."""
    return out * gates.unsqueeze(-1).to(out.dtype)


class MoHAttention(LlamaAttention):
    """LLaMA's attention with each head's output multiplied by its gate.

    With equally many active heads in each KV group (``moh_routing_groups`` of as many groups, or a single KV group) the
    active heads alone are computed, in slots, by every attention implementation. Otherwise a prompt is computed for the
    active heads alone where that is faster, and else every head is computed.
    """

    def __init__(self, config: MoHConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.router = MoHRouter(config, layer_idx)
        groups, active = config.num_attention_heads // self.num_key_value_groups, config.heads_of(layer_idx)[1]
        self.in_slots = config.moh_routing_groups == groups and active < config.num_attention_heads
        if self.in_slots:
            # The attention implementations read here how many of their query heads share a KV group.
            self.num_key_value_groups = active // groups

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention: [B, S, D] -> ([B, S, D], attention weights or None).

        The weights are [B, N, S, keys], or in slots [B, G * k, S, keys]: those of the k heads that each token uses of
        each KV group, in rising order of the heads.
        """
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BSNH = self.q_proj(hidden_states).view(heads)
        gates_BSN = self.router(hidden_states, q_BSNH)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(q_BSNH.transpose(1, 2), key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if self.in_slots:
            slots = Slots(gates_BSN, key.shape[1], self.num_key_value_groups)
            chosen_query = slots.take(query.transpose(1, 2)).transpose(1, 2)
            out_BSnH, weights = self.attend(chosen_query, key, value, attention_mask, **kwargs)
            gated_BSNH = slots.put(gated(out_BSnH, slots.take(gates_BSN)))
        else:
            active_BSN = gates_BSN > 0
            causal = attention_mask is None and kwargs.get("is_causal") is not False
            if self.implementation == "sdpa" and causal and self.skipping_is_faster(query, key, active_BSN):
                out_BSNH, weights = attend_active(query, key, value, active_BSN, self.scaling), None
            else:
                out_BSNH, weights = self.attend(query, key, value, attention_mask, **kwargs)
            gated_BSNH = gated(out_BSNH, gates_BSN)
        return self.o_proj(gated_BSNH.flatten(2)), weights

    @property
    def implementation(self) -> str:
        return self.config._attn_implementation or "eager"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of n query heads, ``num_key_value_groups`` for each of the keys', by the chosen implementation.

        Args:
            query: [B, n, S, H].
            key, value: [B, G, keys, H].

        Returns:
            [B, S, n, H], attention weights [B, n, S, keys] or None.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def skipping_is_faster(self, query: Tensor, key: Tensor, active: Tensor) -> bool:
        """Whether ``query`` [B, N, S, H] is a whole prompt, with keys [B, groups, S, H] of no earlier tokens, that
        ``attend_active`` computes faster."""
        length, heads_per_group = query.shape[2], query.shape[1] // key.shape[1]
        shortest, share = SKIPPING_THRESHOLDS[max(least for least in SKIPPING_THRESHOLDS if least <= heads_per_group)]
        return (
            query.device.type == "cpu"
            and query.dtype == torch.float32
            and torch.get_num_threads() == 1
            and not self.training
            and not query.requires_grad
            and shortest <= length == key.shape[2]
            and active.float().mean().item() <= share
        )


class MoHForCausalLM(LlamaForCausalLM):
    """LlamaForCausalLM with Mixture-of-Head attention in every layer.

    The loss returned for ``labels`` is the language-model loss alone: the balance loss of eq. 7-8 is not added, and
    the query_norm router's gates pass no gradient. Both belong to the training code this model was exported from.
    """

    config_class = MoHConfig
    _keep_in_fp32_modules = ["router"]  # noqa: RUF012 - as Transformers declares it
    """The weights of a new router are too small for fp16."""

    def __init__(self, config: MoHConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = MoHAttention(config, index)
        self.post_init()
