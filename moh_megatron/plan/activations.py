"""Estimates the bytes of activations that autograd keeps of one micro-batch on one rank.

The tensors that each layer saves for its backward pass are counted one by one, for Megatron-core's unfused layer with
fused attention, which keeps no scores. Temporaries inside one operation, the allocator's fragments and the CUDA context
are not counted. A test compares the estimate with what autograd saves on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from moh_megatron.config.layer_heads import LayerHeads, heads_after
from moh_megatron.config.schema import Config
from moh_megatron.monitor.flops import skips_heads
from moh_megatron.plan.model_states import ELEMENT

_FP32, _INT64 = 4, 8
_ROUTER_BYTES = 25
"""Bytes of the logits, probabilities, choice and gate of one head and token."""


@dataclass(frozen=True)
class Activations:
    """Bytes of activations on one rank."""

    layers: int
    """Kept by all layers until their backward pass."""
    recomputed: int
    """Kept again by one layer at a time under full recomputation, else 0."""
    head: int
    """The last norm, the logits, their softmax and its gradient."""

    @property
    def total(self) -> int:
        return self.layers + self.recomputed + self.head


def activations(config: Config, backend: str) -> Activations:
    """The activations with attention by ``backend``, see ``model.attention_backend.attention_backend``.

    An activation schedule begins with all heads: that is when most is kept.
    """
    model, train, tensor = config.model, config.train, config.parallel.tensor
    count = _Count(config, backend)
    layers = [count.layer(heads) for heads in heads_after(model, config.moh, 0)]
    logits = _FP32 + (count.element if count.element < _FP32 else 0)
    head = count.norm() + count.tokens * logits * model.vocab_size // tensor
    if train.recompute == "full":
        inputs = len(layers) * count.element * model.hidden_size * count.own_tokens
        return Activations(inputs, max(layers), head)
    return Activations(sum(layers), 0, head)


class _Count:
    def __init__(self, config: Config, backend: str) -> None:
        self.config, self.backend = config, backend
        self.element = ELEMENT[config.train.precision]
        self.tokens = config.train.micro_batch_size * config.train.sequence_length
        self.own_tokens = self.tokens // (config.parallel.tensor if config.parallel.sequence else 1)
        """This rank's tokens outside attention and MLP, which sequence parallelism shards."""

    def _backend_of(self, heads: LayerHeads) -> str:
        """The backend of one layer: ``auto`` takes dense attention where every head is active."""
        every_head = heads.active == heads.count and self.config.moh.fixed_backend is None
        return "dense" if every_head else self.backend

    def layer(self, heads: LayerHeads) -> int:
        parts = 2 * self.norm() + self._attention(heads) + self._mlp()
        return parts + (self._routing() if self.config.moh.enabled else 0)

    def norm(self) -> int:
        """Input in fp32, the normalised input, and its product with the weight."""
        return self.own_tokens * ((_FP32 + 2 * self.element) * self.config.model.hidden_size + _FP32)

    def _mlp(self) -> int:
        """Gate and up projection, SwiGLU's two factors and their product."""
        return self.tokens * 5 * self.element * self.config.model.ffn_hidden_size // self.config.parallel.tensor

    def _attention(self, heads: LayerHeads) -> int:
        model, train, tensor = self.config.model, self.config.train, self.config.parallel.tensor
        size, own, groups = model.head_dim, heads.count // tensor, model.query_groups // tensor
        angles = 4 * self.element * size * train.sequence_length
        output, backend = self.element * own * size, self._backend_of(heads)
        if backend == "slots":
            return self.tokens * (self._slots(heads) + output) + angles
        # The fused projection, the rotated queries and keys, and the input of linear_proj.
        kept = self.element * size * (2 * own + 3 * groups) + output
        if self.config.moh.enabled:
            kept += output  # the input of the gates
        if train.recompute != "selective":
            active = own * heads.active / heads.count
            if skips_heads(backend):
                kept += int(active * (_FP32 * size + 3 * _INT64))
            else:
                kept += _FP32 * own + (output if self.config.moh.enabled else 0)
        return self.tokens * kept + angles

    def _slots(self, heads: LayerHeads) -> int:
        """Bytes of a token without the input of linear_proj: only the heads in slots have queries and outputs."""
        model, tensor = self.config.model, self.config.parallel.tensor
        slots, groups = heads.active // tensor, model.query_groups // tensor
        # Queries, rotated keys, values, outputs; gates and indices of the slots.
        kept = self.element * model.head_dim * (2 * slots + 2 * groups) + (self.element + _INT64) * slots
        return kept if self.config.train.recompute == "selective" else kept + _FP32 * slots

    def _routing(self) -> int:
        """Every rank routes over all heads, in fp32."""
        model, moh = self.config.model, self.config.moh
        routing = self.own_tokens * _ROUTER_BYTES * model.num_attention_heads
        if moh.router == "query_norm":
            return routing + self.tokens * _FP32 * model.num_attention_heads // self.config.parallel.tensor * (
                model.head_dim
            )
        return routing + (self.own_tokens * _FP32 * model.hidden_size if self.element < _FP32 else 0)
