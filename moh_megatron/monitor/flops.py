"""Floating-point operations of a token, forward and backward, under three counts that are never mixed.

Counted are matrix products, two operations to a multiply-add; norms, activations, softmax and the loss are left out.
Attention is causal: a query meets (S + 1) / 2 keys on average; with ``causal=False`` it is counted as if it met all S,
as torch's own counter and many quoted figures do. Borders of documents are not known here; with
data.document_mask the attention part is an upper bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads, heads_after
from moh_megatron.config.parameter_count import router_weight_rows
from moh_megatron.config.schema import Config

_MULTIPLY_ADD = 2
_WEIGHT = 3
"""Products with a weight: forward, and backward the gradients of its input and of itself."""
_FORWARD, _BACKWARD = 2, 4
"""Products of attention, S x S x H each: scores and output; backward the gradients of v, p, q and k."""


@dataclass(frozen=True)
class Flops:
    """Operations of one token."""

    layers: float
    head: float
    """The output layer; the embedding is looked up."""

    @property
    def total(self) -> float:
        return self.layers + self.head


@dataclass(frozen=True)
class FlopsPerToken:
    """Of the heads a token uses at one step."""

    dense_equivalent: Flops
    """Of the dense twin: every head, no router. Model FLOPs as they are usually quoted."""
    active_heads: Flops
    """What the model asks for: attention and output of active heads only, and their queries (all, if norms route)."""
    executed: Flops
    """What is computed: heads that are masked afterwards, dense projections, and what is computed again, be it by
    fused attention's backward pass or by train.recompute."""


def skips_heads(backend: str) -> bool:
    """Whether an attention backend leaves inactive heads out rather than masking them."""
    return backend != "dense"


Backends = str | Sequence[Sequence[str]]
"""What computes attention: everywhere, or of each layer on each tensor-parallel rank, as
``model.attention_backend.attention_backends`` says."""


def flops_per_token(
    config: Config, backends: Backends, *, step: int | None = None, causal: bool = True
) -> FlopsPerToken:
    """After ``step`` steps of the activation schedule; None: when it has run out."""
    head = _MULTIPLY_ADD * _WEIGHT * float(config.model.hidden_size * config.model.vocab_size)
    layers = [*_layers(config, backends, step, causal)]
    return FlopsPerToken(
        dense_equivalent=Flops(sum(each.dense for each in layers), head),
        active_heads=Flops(sum(each.active for each in layers), head),
        executed=Flops(sum(each.executed for each in layers), head),
    )


@dataclass(frozen=True)
class _Layer:
    dense: float
    active: float
    executed: float


def computed_heads(config: Config, backends: Backends, step: int | None = None) -> list[float]:
    """Of each layer, for how many heads a token's attention is computed, over all tensor-parallel ranks.

    With data.document_mask auto masks short documents' heads, and their lengths are not known here: none counts as
    skipped.
    """
    model, moh, tensor = config.model, config.moh, config.parallel.tensor
    if isinstance(backends, str):
        backends = [[backends] * tensor] * model.num_layers
    unknown = config.data.document_mask and moh.fixed_backend is None
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)

    def computed(heads: LayerHeads, of_layer: Sequence[str]) -> float:
        skips = [skips_heads(backend) and not unknown for backend in of_layer]
        if all(skips):
            return heads.active
        loads = layout.expected_load(heads.shared, heads.active, tensor)
        return sum(load if skip else heads.count / tensor for load, skip in zip(loads, skips, strict=True))

    return [computed(*each) for each in zip(heads_after(model, moh, step), backends, strict=True)]


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
        # Fused attention computes the scores once more in its backward pass.
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
