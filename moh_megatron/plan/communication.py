"""Counts the bytes that one rank sends in a step by each kind of collective, if every collective is a ring.

The three numbers a token of the loss, means of the balance loss, norms and flags are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.parameter_count import router_weight_rows
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.plan.model_states import ELEMENT, zero_settings
from moh_megatron.plan.parameters import total_size, weights
from moh_megatron.plan.stage3 import most_kept, persistent_size

_FP32 = 4
_TIMES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "reduce": 1}
"""How often each rank sends the tensor's size, times (n - 1) / n."""


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind in a step."""

    group: str
    """``tensor`` or ``data``: the parallel group."""
    what: str
    """The tensors that are sent."""
    operation: str
    calls: int
    """The number of tensors; under data parallelism DeepSpeed's buckets split and join them."""
    sent_bytes: int


def communication(config: Config, world_size: int) -> list[Traffic]:
    """The traffic of one rank in a step. Raises UserError if ``world_size`` does not fit the configuration."""
    replicas = data_parallel_size(config, world_size)
    steps = gradient_accumulation_steps(config, world_size)
    found: list[Traffic] = []
    if config.parallel.tensor > 1:
        layers = _sequence_parallel(config) if config.parallel.sequence else _tensor_parallel(config)
        found += _sent("tensor", [*layers, *_routing(config)], config.parallel.tensor, steps)
    if replicas > 1:
        found += _sent("data", _data(config, world_size, steps), replicas, 1)
    return found


@dataclass(frozen=True)
class _Collective:
    what: str
    operation: str
    calls: int
    size: int
    """Bytes of the full tensor of one call."""


def _sent(group: str, collectives: Iterable[_Collective], ranks: int, repeated: int) -> Iterator[Traffic]:
    for collective in collectives:
        sent = _TIMES[collective.operation] * collective.size * (ranks - 1) // ranks
        calls = collective.calls * repeated
        yield Traffic(group, collective.what, collective.operation, calls, calls * sent)


def _hidden(config: Config) -> int:
    """Bytes of one micro-batch's hidden states."""
    train = config.train
    return train.micro_batch_size * train.sequence_length * config.model.hidden_size * ELEMENT[train.precision]


def _forwards(config: Config) -> int:
    return 2 if config.train.recompute == "full" else 1


def _tensor_parallel(config: Config) -> Iterator[_Collective]:
    """All-reduces of the outputs of attention, MLP and embedding, and backward of the gradients of their inputs."""
    layers, hidden = config.model.num_layers, _hidden(config)
    yield _Collective("activations", "all-reduce", 2 * layers * _forwards(config) + 1, hidden)
    yield _Collective("activation gradients", "all-reduce", 2 * layers + 1, hidden)


def _sequence_parallel(config: Config) -> Iterator[_Collective]:
    """An all-gather before and a reduce-scatter after attention and MLP; backward gathers the input again."""
    layers, hidden, forwards = config.model.num_layers, _hidden(config), _forwards(config)
    yield _Collective("activations", "all-gather", 2 * layers * forwards + 1, hidden)
    yield _Collective("activations", "reduce-scatter", 2 * layers * forwards + 1, hidden)
    yield _Collective("activations again, for weight gradients", "all-gather", 2 * layers + 1, hidden)
    yield _Collective("activation gradients", "all-gather", 2 * layers + 1, hidden)
    yield _Collective("activation gradients", "reduce-scatter", 2 * layers + 1, hidden)
    model, element = config.model, ELEMENT[config.train.precision]
    rows = [sum(router_weight_rows(config.moh, heads).values()) for heads in layer_heads(model, config.moh)]
    replicated = sum(rows) * (not config.moh.freeze_router) + 2 * layers + 1
    yield _Collective("gradients of norms and routers", "all-reduce", 1, element * model.hidden_size * replicated)


def _routing(config: Config) -> Iterator[_Collective]:
    """Exchanges of the gates of all heads, in fp32."""
    if not config.moh.enabled:
        return
    model, train = config.model, config.train
    gates = _FP32 * train.micro_batch_size * train.sequence_length * model.num_attention_heads
    forwards = model.num_layers * _forwards(config)
    if config.moh.router == "query_norm":
        yield _Collective("query norms", "all-gather", forwards, gates)
    elif config.parallel.sequence:
        yield _Collective("gates and choices", "all-gather", 2 * forwards, gates)
        yield _Collective("gate gradients", "reduce-scatter", model.num_layers, gates)
        return
    yield _Collective("gate gradients", "all-reduce", model.num_layers, gates)


def _data(config: Config, world_size: int, steps: int) -> Iterator[_Collective]:
    """Gradients are sent in fp32, parameters in the model's precision."""
    stage, element = config.parallel.zero_stage, ELEMENT[config.train.precision]
    held, settings = weights(config), zero_settings(config, world_size)
    trained = total_size(weight for weight in held if weight.trained)
    gradients = _FP32 * trained
    if stage == 3:
        persistent = persistent_size(held, settings)
        partitioned = total_size(held) - persistent
        # Gathered forward and backward, except for parameters that stay gathered because they are used again soon.
        gathered = element * (2 * partitioned - min(partitioned, most_kept(settings)))
        yield _Collective("parameters", "all-gather", steps, gathered)
        yield _Collective("gradients", "reduce-scatter", steps, gradients)
        yield _Collective("updated small parameters", "all-gather", 1, element * persistent)
        return
    # DeepSpeed's default all-reduces complete buckets where a reduction to the owner would suffice.
    gradients_partitioned = stage == 2 or (stage == 1 and config.train.precision == "fp32")
    to_owner = settings.get("reduce_scatter", True) and not settings.get("use_multi_rank_bucket_allreduce", True)
    operation = "reduce" if gradients_partitioned and to_owner else "all-reduce"
    yield _Collective("gradients", operation, steps if stage == 2 else 1, gradients)
    if stage > 0:
        yield _Collective("updated parameters", "all-gather", 1, element * trained)
