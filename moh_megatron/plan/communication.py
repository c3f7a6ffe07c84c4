"""What one rank sends in a step, by kind, if every collective is a ring.

Left out: the loss' three numbers a token, means of the balance loss, norms and flags.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moh_megatron.config.count import router_weight_rows
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.plan.memory import ELEMENT, zero_settings
from moh_megatron.plan.parameters import total_size, weights
from moh_megatron.plan.stage3 import most_kept, persistent_size

_FP32 = 4
_TIMES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "reduce": 1}
"""How often a ring passes the whole tensor on, but for the share (n - 1) / n."""


@dataclass(frozen=True)
class Traffic:
    """One kind of collective over a whole step."""

    group: str
    """``tensor`` or ``data``: which ranks take part."""
    what: str
    operation: str
    calls: int
    """Of one tensor each; DeepSpeed's buckets split and join those of data parallelism."""
    sent_bytes: int


def communication(config: Config, world_size: int) -> list[Traffic]:
    """Raises UserError where ``world_size`` does not suit the configuration."""
    replicas = data_parallel_size(config, world_size)
    steps = gradient_accumulation_steps(config, world_size)
    found: list[Traffic] = []
    if config.parallel.tensor > 1:
        parts = _sharded_sequence(config) if config.parallel.sequence else _whole_sequence(config)
        found += _sent("tensor", [*parts, *_routing(config)], config.parallel.tensor, steps)
    if replicas > 1:
        found += _sent("data", _data(config, world_size, steps), replicas, 1)
    return found


@dataclass(frozen=True)
class _Part:
    what: str
    operation: str
    calls: int
    size: int
    """Bytes of the whole tensor of one call."""


def _sent(group: str, parts: Iterator[_Part] | list[_Part], ranks: int, repeated: int) -> Iterator[Traffic]:
    for part in parts:
        passed = _TIMES[part.operation] * part.size * (ranks - 1) // ranks
        calls = part.calls * repeated
        yield Traffic(group, part.what, part.operation, calls, calls * passed)


def _hidden(config: Config) -> int:
    """Bytes of one micro-batch's hidden states."""
    train = config.train
    return train.micro_batch_size * train.sequence_length * config.model.hidden_size * ELEMENT[train.precision]


def _forwards(config: Config) -> int:
    return 2 if config.train.recompute == "full" else 1


def _whole_sequence(config: Config) -> Iterator[_Part]:
    """Attention and MLP each sum their outputs, and backward the gradient of their input; so do both ends."""
    layers, hidden = config.model.num_layers, _hidden(config)
    yield _Part("activations", "all-reduce", 2 * layers * _forwards(config) + 1, hidden)
    yield _Part("activation gradients", "all-reduce", 2 * layers + 1, hidden)


def _sharded_sequence(config: Config) -> Iterator[_Part]:
    """A gather before, a scatter behind attention and MLP; backward the input is gathered again for the weights."""
    layers, hidden, forwards = config.model.num_layers, _hidden(config), _forwards(config)
    yield _Part("activations", "all-gather", 2 * layers * forwards + 1, hidden)
    yield _Part("activations", "reduce-scatter", 2 * layers * forwards + 1, hidden)
    yield _Part("activations again, for weight gradients", "all-gather", 2 * layers + 1, hidden)
    yield _Part("activation gradients", "all-gather", 2 * layers + 1, hidden)
    yield _Part("activation gradients", "reduce-scatter", 2 * layers + 1, hidden)
    model, element = config.model, ELEMENT[config.train.precision]
    rows = [sum(router_weight_rows(config.moh, heads).values()) for heads in layer_heads(model, config.moh)]
    replicated = sum(rows) * (not config.moh.freeze_router) + 2 * layers + 1
    yield _Part("gradients of norms and routers", "all-reduce", 1, element * model.hidden_size * replicated)


def _routing(config: Config) -> Iterator[_Part]:
    """Gates, fp32, of all heads."""
    if not config.moh.enabled:
        return
    model, train = config.model, config.train
    gates = _FP32 * train.micro_batch_size * train.sequence_length * model.num_attention_heads
    forwards = model.num_layers * _forwards(config)
    if config.moh.router == "query_norm":
        yield _Part("query norms", "all-gather", forwards, gates)
    elif config.parallel.sequence:
        yield _Part("gates and choices", "all-gather", 2 * forwards, gates)
        yield _Part("gate gradients", "reduce-scatter", model.num_layers, gates)
        return
    yield _Part("gate gradients", "all-reduce", model.num_layers, gates)


def _data(config: Config, world_size: int, steps: int) -> Iterator[_Part]:
    """Gradients travel in fp32; parameters in the model's precision."""
    stage, element = config.parallel.zero_stage, ELEMENT[config.train.precision]
    held, settings = weights(config), zero_settings(config, world_size)
    trained = total_size(each for each in held if each.trained)
    gradients = _FP32 * trained
    if stage == 3:
        persistent = persistent_size(held, settings)
        shared = total_size(held) - persistent
        # Gathered forward and backward, but for what is used again before much else is.
        gathered = element * (2 * shared - min(shared, most_kept(settings)))
        yield _Part("parameters", "all-gather", steps, gathered)
        yield _Part("gradients", "reduce-scatter", steps, gradients)
        yield _Part("updated small parameters", "all-gather", 1, element * persistent)
        return
    # DeepSpeed's default sends whole buckets through an all-reduce where a reduction to the owner would do.
    partitioned = stage == 2 or (stage == 1 and config.train.precision == "fp32")
    to_owner = settings.get("reduce_scatter", True) and not settings.get("use_multi_rank_bucket_allreduce", True)
    operation = "reduce" if partitioned and to_owner else "all-reduce"
    yield _Part("gradients", operation, steps if stage == 2 else 1, gradients)
    if stage > 0:
        yield _Part("updated parameters", "all-gather", 1, element * trained)
