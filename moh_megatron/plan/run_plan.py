"""Collects every number that ``moh-plan`` reports of a run before it starts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads, even_in_kv_groups, layer_heads
from moh_megatron.config.parameter_count import ParameterCount, parameter_count
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.monitor.flops import FlopsPerToken, flops_per_token
from moh_megatron.plan.activations import Activations, activations
from moh_megatron.plan.communication import Traffic, communication
from moh_megatron.plan.model_states import ModelStates, model_states


@dataclass(frozen=True)
class HeadBalance:
    """The load of the tensor-parallel ranks in layers with the same heads, if routed heads are chosen evenly."""

    layers: tuple[int, ...]
    """The numbers of the layers, from 1."""
    shared: int
    active: int
    heads: int
    load: tuple[float, ...]
    """The heads each rank computes for a token."""
    imbalance: float
    """The busiest rank's load over the mean."""
    routing_groups: int
    """The groups of heads in each of which a token uses equally many: the KV groups, or one, all heads."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a run; bytes are those of the busiest rank."""

    world_size: int
    tensor: int
    data: int
    accumulation_steps: int
    tokens_per_step: int
    steps: int
    parameters: ParameterCount
    states: ModelStates
    activations: Activations
    backend: str
    """The attention backend."""
    flops: FlopsPerToken
    head_balance: tuple[HeadBalance, ...]
    communication: tuple[Traffic, ...]

    @property
    def device_bytes(self) -> int:
        return self.states.device + self.activations.total


def make_plan(config: Config, world_size: int) -> Plan:
    """The plan of a run on ``world_size`` ranks. Raises UserError if they do not fit the configuration."""
    if config.moh.routing_groups == "kv" and config.moh.shared_placement == "calibrated":
        # Which heads of a group are shared changes no number.
        config = dataclasses.replace(config, moh=dataclasses.replace(config.moh, shared_placement="spread"))
    backend = backend_on_gpus(config)
    return Plan(
        world_size=world_size,
        tensor=config.parallel.tensor,
        data=data_parallel_size(config, world_size),
        accumulation_steps=gradient_accumulation_steps(config, world_size),
        tokens_per_step=config.train.tokens_per_step,
        steps=config.train.steps,
        parameters=parameter_count(config.model, config.moh),
        states=model_states(config, world_size),
        activations=activations(config, backend),
        backend=backend,
        flops=flops_per_token(config, backend),
        head_balance=tuple(_head_balance(config)),
        communication=tuple(communication(config, world_size)),
    )


def backend_on_gpus(config: Config) -> str:
    """The attention backend on GPUs, where ``auto`` is slots or dense; see ``moh.backends.choice``."""
    skips = any(heads.active < heads.count for heads in layer_heads(config.model, config.moh))
    automatic = "slots" if skips and even_in_kv_groups(config.model, config.moh) else "dense"
    return config.moh.fixed_backend or automatic


def _head_balance(config: Config) -> list[HeadBalance]:
    model, tensor = config.model, config.parallel.tensor
    layout = HeadLayout(model.num_attention_heads, model.query_groups, config.moh.head_layout)
    found: dict[LayerHeads, list[int]] = {}
    for number, heads in enumerate(layer_heads(model, config.moh), start=1):
        found.setdefault(heads, []).append(number)
    return [
        HeadBalance(
            layers=tuple(numbers),
            shared=len(heads.shared),
            active=heads.active,
            heads=heads.count,
            load=tuple(layout.expected_load(heads.shared, heads.active, tensor)),
            imbalance=layout.imbalance(heads.shared, heads.active, tensor),
            routing_groups=heads.groups,
        )
        for heads, numbers in found.items()
    ]


def as_ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers as ranges: ``1-3, 7`` for 1, 2, 3, 7."""
    grouped = itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    ranges = [[number for _, number in group] for _, group in grouped]
    return ", ".join(str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}" for found in ranges)
