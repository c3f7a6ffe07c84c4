"""Lists the parameters of one tensor-parallel rank in the model's order, in which ZeRO partitions them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moh_megatron.config.layer_heads import LayerHeads, layer_heads
from moh_megatron.config.parameter_count import router_weight_rows
from moh_megatron.config.schema import Config


class Weight(NamedTuple):
    """One parameter."""

    name: str
    """Its name in Megatron-core."""
    size: int
    """The number of elements on this rank."""
    matrix: bool
    """Whether weight decay applies; norms are excluded, in a parameter group of their own."""
    trained: bool = True


def weights(config: Config) -> list[Weight]:
    """Every parameter of a validated configuration on one tensor-parallel rank."""
    model, tensor = config.model, config.parallel.tensor
    vocabulary = model.vocab_size // tensor * model.hidden_size
    found = [Weight("embedding.word_embeddings.weight", vocabulary, matrix=True)]
    for index, heads in enumerate(layer_heads(model, config.moh)):
        found += (weight._replace(name=f"decoder.layers.{index}.{weight.name}") for weight in _layer(config, heads))
    found.append(Weight("decoder.final_layernorm.weight", model.hidden_size, matrix=False))
    if not model.tie_word_embeddings:
        found.append(Weight("output_layer.weight", vocabulary, matrix=True))
    return found


def _layer(config: Config, heads: LayerHeads) -> Iterator[Weight]:
    model, tensor = config.model, config.parallel.tensor
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor
    queries, keys = (count // tensor * model.head_dim for count in (model.num_attention_heads, model.query_groups))
    yield Weight("input_layernorm.weight", hidden, matrix=False)
    yield Weight("self_attention.linear_proj.weight", queries * hidden, matrix=True)
    yield Weight("self_attention.linear_qkv.weight", (queries + 2 * keys) * hidden, matrix=True)
    for name, rows in router_weight_rows(config.moh, heads).items():
        yield Weight(f"self_attention.router.{name}", rows * hidden, matrix=True, trained=not config.moh.freeze_router)
    yield Weight("pre_mlp_layernorm.weight", hidden, matrix=False)
    yield Weight("mlp.linear_fc1.weight", 2 * ffn * hidden, matrix=True)
    yield Weight("mlp.linear_fc2.weight", ffn * hidden, matrix=True)


def total_size(parameters: Iterable[Weight]) -> int:
    """The number of elements of all ``parameters``."""
    return sum(weight.size for weight in parameters)
