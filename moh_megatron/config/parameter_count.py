"""Counts the parameters of a configuration without building the model."""

from __future__ import annotations

from dataclasses import dataclass

from moh_megatron.config.layer_heads import LayerHeads, layer_heads
from moh_megatron.config.schema import Config, ModelConfig, MoHConfig


@dataclass(frozen=True)
class ParameterCount:
    dense: int
    """Parameters of the dense twin: embeddings, attention, SwiGLU, norms."""
    router: int
    """Parameters of the routers of all layers."""

    @property
    def total(self) -> int:
        return self.dense + self.router


def parameter_count(model: ModelConfig, moh: MoHConfig) -> ParameterCount:
    """Count the parameters of a validated configuration, over all tensor-parallel ranks."""
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    query_and_output = 2 * model.hidden_size * model.num_attention_heads * model.head_dim
    key_and_value = 2 * model.hidden_size * model.query_groups * model.head_dim
    swiglu = 3 * model.hidden_size * model.ffn_hidden_size
    norms = 2 * model.hidden_size
    layer = query_and_output + key_and_value + swiglu + norms
    router_rows = sum(sum(router_weight_rows(moh, heads).values()) for heads in layer_heads(model, moh))
    return ParameterCount(
        dense=embeddings + model.num_layers * layer + model.hidden_size,
        router=model.hidden_size * router_rows,
    )


def rank_parameters(config: Config) -> int:
    """Parameters of one tensor-parallel rank: its share of the sharded ones, and all of routers and norms."""
    model, count = config.model, parameter_count(config.model, config.moh)
    replicated = count.router + model.hidden_size * (2 * model.num_layers + 1)
    return (count.total - replicated) // config.parallel.tensor + replicated


def router_weight_rows(moh: MoHConfig, heads: LayerHeads) -> dict[str, int]:
    """Rows (output features) of each weight of one layer's learned router (paper eq. 5-6), without absent weights.

    ``w_shared`` is absent for a single shared head besides routed ones, whose gate within the shared heads is 1.
    ``w_alpha`` is absent unless there are both shared and routed heads. Other routers have no weights.
    """
    if not moh.enabled or moh.router != "learned":
        return {}
    shared, routed = len(heads.shared), len(heads.routed)
    rows = {
        "w_shared": shared if shared > 1 or not routed else 0,
        "w_routed": routed,
        "w_alpha": 2 if shared and routed else 0,
    }
    return {name: count for name, count in rows.items() if count}


def router_biases(moh: MoHConfig, heads: LayerHeads) -> int:
    """The number of biases that balance the routed heads of one layer; 0 with a balance loss."""
    return len(heads.routed) if moh.enabled and moh.balancing == "bias" else 0
