"""A LLaMA whose attention is Mixture-of-Head (arXiv 2410.11842). Needs torch and transformers alone.

Legend: S sequence, B batch, D hidden size, N query heads, E routed heads, H head size.
A router numbers the shared heads first, then the routed ones; gates are returned in the order of the projections.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import maybe_autocast

from .configuration_moh import MoHConfig

PAYS = {1: (1024, 0.5), 2: (512, 0.5), 4: (512, 0.75)}
"""By the query heads of a KV group, at least: from which length on, up to which share of active heads, skipping the
others is faster on one thread of a CPU, in fp32. On two, of a busy machine, and in fp16 it was slower; in bf16, which
rounds the scores, tokens could differ; GPUs were not measured."""
ROWS = 256


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest of the last dimension; ties go to the lower index (topk promises no order)."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def attend_active(query: Tensor, key: Tensor, value: Tensor, active: Tensor, scaling: float) -> Tensor:
    """Causal attention of the active (token, head) pairs alone; 0 elsewhere. For inference.

    The query heads of a KV group read the same keys: their active queries make one list in the order of positions, and
    a run of ROWS of it meets one range of keys.

    Args:
        query: [B, N, S, H].
        key, value: [B, KV groups, S, H].
        active: [B, S, N].

    Returns:
        [B, S, N, H].
    """
    groups, length = key.shape[1:3]
    width = query.shape[1] // groups
    out = query.new_zeros(query.transpose(1, 2).shape)
    index = torch.arange(length, device=query.device)
    for row in range(query.shape[0]):
        for group in range(groups):
            heads = slice(group * width, (group + 1) * width)
            position, head = active[row, :, heads].nonzero().unbind(1)
            queries = query[row, heads][head, position] * scaling
            ends = position.tolist()
            for start in range(0, len(ends), ROWS):
                run = slice(start, start + ROWS)
                seen_by_all, seen = ends[start] + 1, ends[run][-1] + 1
                scores = (queries[run] @ key[row, group, :seen].t()).float()
                scores[:, seen_by_all:].masked_fill_(index[seen_by_all:seen] > position[run, None], -torch.inf)
                weights = scores.softmax(-1).to(value.dtype)
                queries[run] = weights @ value[row, group, :seen]
            out[row, :, heads][position, head] = queries
    return out


class MoHRouter(nn.Module):
    """The weight of each head for each token. Arithmetic in fp32, whatever the model's precision.

    The learned router has bias-free linears ``shared`` [n_shared, D] (absent for one shared head beside routed ones),
    ``routed`` [E, D] and ``alpha`` [2, D], row 0 shared, row 1 routed (absent without shared or without routed heads).
    The query_norm router has no parameters. A model balanced by biases has ``bias_steps`` [E], whole numbers, worth
    ``moh_bias_update_rate`` each in the score that heads are chosen by.
    """

    bias_steps: Tensor

    def __init__(self, config: MoHConfig, layer: int):
        super().__init__()
        shared, active = config.heads_of(layer)
        order = shared + [head for head in range(config.num_attention_heads) if head not in shared]
        self.order = order
        self.place = sorted(range(len(order)), key=order.__getitem__)
        self.learned = config.moh_router == "learned"
        self.normalized = config.moh_gating == "normalized"
        self.n_shared = len(shared)
        self.n_routed = config.num_attention_heads - self.n_shared
        self.top_k = active - self.n_shared
        self.bias_rate = config.moh_bias_update_rate
        if self.bias_rate is not None and self.n_routed:
            self.register_buffer("bias_steps", torch.zeros(self.n_routed, dtype=torch.int64))

        def linear(present: bool, rows: int) -> nn.Linear | None:
            return nn.Linear(config.hidden_size, rows, bias=False) if self.learned and present else None

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
            return gates if self.place == list(range(len(self.place))) else gates[..., self.place]

    def chosen(self, scores: Tensor) -> Tensor:
        """[B, S, E] bool: the ``top_k`` routed heads of each token."""
        if self.bias_rate is not None:
            scores = scores + self.bias_steps.float() * self.bias_rate
        return top_k_mask(scores, self.top_k)

    def query_norm_gates(self, queries: Tensor) -> Tensor:
        """1 for the shared heads and for the ``top_k`` routed heads with the longest queries, 0 for the others."""
        norms = torch.linalg.vector_norm(queries, dim=-1)[..., self.order]
        scores = norms[..., self.n_shared :]
        if self.bias_rate is not None:
            deviation = scores.std(-1, keepdim=True) if self.n_routed > 1 else torch.zeros_like(scores)
            scores = scores.masked_fill(deviation <= 0, 0.0) / deviation.masked_fill(deviation <= 0, 1.0)
        return torch.cat([torch.ones_like(norms[..., : self.n_shared]), self.chosen(scores).float()], dim=-1)

    def learned_gates(self, x: Tensor) -> Tensor:
        """Eq. 5-6, or their normalised form, in which every active gate is 1 at uniform logits."""
        shared = x.new_ones(*x.shape[:-1], self.n_shared)
        if self.shared is not None:
            shared = F.linear(x, self.shared.weight.float()).softmax(-1)
            if self.normalized or self.routed is None:
                shared = shared * self.n_shared
        if self.routed is None:
            return shared
        logits = F.linear(x, self.routed.weight.float())
        chosen = self.chosen(logits)
        if self.normalized:
            routed = self.top_k * logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        else:
            routed = logits.softmax(-1) * chosen
        if self.alpha is None:
            return routed
        alpha = F.linear(x, self.alpha.weight.float()).softmax(-1)
        if self.normalized:
            alpha = 2 * alpha
        return torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * routed], dim=-1)


class MoHAttention(LlamaAttention):
    """LLaMA's attention with each head's output multiplied by its gate.

    Where it pays, a prompt is computed for the active heads alone; else every head is.
    """

    def __init__(self, config: MoHConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.router = MoHRouter(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaAttention: [B, S, D] -> ([B, S, D], attention weights or None)."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q_BSNH = self.q_proj(hidden_states).view(heads)
        gates_BSN = self.router(hidden_states, q_BSNH)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = apply_rotary_pos_emb(q_BSNH.transpose(1, 2), key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation or "eager"
        active_BSN = gates_BSN > 0
        weights = None
        causal = attention_mask is None and kwargs.get("is_causal") is not False
        if implementation == "sdpa" and causal and self.skipping_pays(query, key, active_BSN):
            out_BSNH = attend_active(query, key, value, active_BSN, self.scaling)
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            out_BSNH, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        out_BSNH = out_BSNH * gates_BSN.unsqueeze(-1).to(out_BSNH.dtype)
        return self.o_proj(out_BSNH.flatten(2)), weights

    def skipping_pays(self, query: Tensor, key: Tensor, active: Tensor) -> bool:
        """Whether [B, N, S, H] is a prompt, all of which [B, groups, S, H] is seen, that ``attend_active`` makes
        faster."""
        length, width = query.shape[2], query.shape[1] // key.shape[1]
        shortest, share = PAYS[max(each for each in PAYS if each <= width)]
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
    """A new router's weights are too small for fp16."""

    def __init__(self, config: MoHConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = MoHAttention(config, index)
        self.post_init()
