"""Counts floating-point operations per token, forward and backward, in three ways that are never mixed.

Only matrix products count, with two operations per multiply-add; norms, activations, softmax and the loss do not.
Attention is causal: a query attends to (S + 1) / 2 keys on average. With ``causal=False`` it counts as if it attended
to all S, as in torch's own counter and in many quoted figures. The boundaries of documents are not known here: with
data.document_mask the attention part is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads, even_in_kv_groups, heads_after
from moh_megatron.config.parameter_count import router_weight_rows
from moh_megatron.config.schema import Config

_MULTIPLY_ADD = 2
_WEIGHT = 3
"""Products with a weight: one forward, and backward the gradients of its input and of itself."""
_FORWARD, _BACKWARD = 2, 4
"""Products of attention, S x S x H each: forward scores and output; backward the gradients of v, p, q and k."""


@dataclass(frozen=True)
class Flops:
    """Operations per token."""

    layers: float
    head: float
    """The output layer; the embedding is a lookup without operations."""

    @property
    def total(self) -> float:
        return self.layers + self.head


@dataclass(frozen=True)
class FlopsPerToken:
    """Operations per token, with the heads that are active at one step."""

    dense_equivalent: Flops
    """The dense twin, with every head and no router: model FLOPs as they are usually quoted."""
    active_heads: Flops
    """What the model needs: attention and output of active heads only, and their queries (all under query_norm)."""
    executed: Flops
    """What is computed, including heads that are masked afterwards, dense projections, and everything that the backward
    pass of fused attention or train.recompute computes again."""


def skips_heads(backend: str) -> bool:
    """Whether an attention backend leaves inactive heads out instead of masking them."""
    return backend != "dense"


Backends = str | Sequence[Sequence[str]]
"""The attention backend of all layers, or [layer][tensor-parallel rank], as
``model.attention_backend.attention_backends`` returns them."""


def flops_per_token(
    config: Config, backends: Backends, *, step: int | None = None, causal: bool = True
) -> FlopsPerToken:
    """Operations per token after ``step`` steps of the activation schedule; None: after its end."""
    head = _MULTIPLY_ADD * _WEIGHT * float(config.model.hidden_size * config.model.vocab_size)
    layers = [*_layers(config, backends, step, causal)]
    return FlopsPerToken(
        dense_equivalent=Flops(sum(layer.dense for layer in layers), head),
        active_heads=Flops(sum(layer.active for layer in layers), head),
        executed=Flops(sum(layer.executed for layer in layers), head),
    )


@dataclass(frozen=True)
class _Layer:
    dense: float
    active: float
    executed: float


def computed_heads(config: Config, backends: Backends, step: int | None = None) -> list[float]:
    """For each layer, the number of heads whose attention is computed per token, over all tensor-parallel ranks.

    With data.document_mask the backend ``auto`` masks the heads of short documents. The lengths of documents are not
    known here, so no head counts as skipped then. With equally many active heads in every KV group there is nothing to
    mask: ``slots`` skips inactive heads at every length.
    """
    model, moh, tensor = config.model, config.moh, config.parallel.tensor
    if isinstance(backends, str):
        backends = [[backends] * tensor] * model.num_layers
    unknown = config.data.document_mask and moh.fixed_backend is None and not even_in_kv_groups(model, moh)
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)

    def computed(heads: LayerHeads, layer_backends: Sequence[str]) -> float:
        skips = [skips_heads(backend) and not unknown for backend in layer_backends]
        if all(skips):
            return heads.active
        loads = layout.expected_load(heads.shared, heads.active, tensor)
        return sum(load if skip else heads.count / tensor for load, skip in zip(loads, skips, strict=True))

    return [computed(heads, names) for heads, names in zip(heads_after(model, moh, step), backends, strict=True)]


def _layers(config: Config, backends: Backends, step: int | None, causal: bool) -> Iterator[_Layer]:
    model, moh, recompute = config.model, config.moh, config.train.recompute
    head = model.hidden_size * model.head_dim
    shared_work = 2 * model.query_groups * head + 3 * model.hidden_size * model.ffn_hidden_size
    length = config.train.sequence_length
    core = model.head_dim * ((length + 1) / 2 if causal else length)
    layers = heads_after(model, moh, step)
    for heads, computed in zip(layers, computed_heads(config, backends, step), strict=True):
        router = model.hidden_size * sum(router_weight_rows(moh, heads).values())
        queries = heads.count if moh.enabled and moh.router == "query_norm" else heads.active
        # Fused attention computes the scores again in its backward pass.
        weights, attention = _WEIGHT, _FORWARD + _BACKWARD + 1
        if recompute != "none":
            attention += _FORWARD
        if recompute == "full":
            weights += 1
        dense_weights = shared_work + 2 * heads.count * head
        yield _Layer(
            dense=_MULTIPLY_ADD * (_WEIGHT * dense_weights + (_FORWARD + _BACKWARD) * heads.count * core),
            active=_MULTIPLY_ADD
            * (
                _WEIGHT * (shared_work + (queries + heads.active) * head + router)
                + (_FORWARD + _BACKWARD) * heads.active * core
            ),
            executed=_MULTIPLY_ADD * (weights * (dense_weights + router) + attention * computed * core),
        )
