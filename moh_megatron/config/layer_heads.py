"""Resolves moh.shared_heads and moh.active_heads to the heads of each layer; the only interpreter of these keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from moh_megatron.config.schema import ModelConfig, MoHConfig
from moh_megatron.io.errors import UserError


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer, by logical number."""

    count: int
    """The number of query heads."""
    shared: tuple[int, ...]
    """The heads that every token uses, ascending."""
    active: int
    """The number of heads a token uses, shared ones included, when the activation schedule has ended."""
    groups: int = 1
    """Routing groups: a token uses equally many heads of each of these groups of consecutive heads, of which equally
    many are shared."""

    @cached_property
    def routed(self) -> tuple[int, ...]:
        """The heads that are not shared, ascending."""
        return tuple(sorted(set(range(self.count)) - set(self.shared)))

    @property
    def order(self) -> tuple[int, ...]:
        """The heads in a router's order: shared ones first, each kind group by group."""
        return (*self.shared, *self.routed)

    @property
    def top_k(self) -> int:
        """The number of routed heads a token uses."""
        return self.active - len(self.shared)

    def at(self, step: int, schedule_steps: int) -> LayerHeads:
        """These heads after ``step`` steps of the activation schedule, see ``top_k_at``."""
        return replace(self, active=len(self.shared) + self.top_k_at(step, schedule_steps))

    def top_k_at(self, step: int, schedule_steps: int) -> int:
        """The number of routed heads a token uses after ``step`` steps: all at first, ``top_k`` at the end.

        It falls by one head in each routing group at a time.
        """
        if step >= schedule_steps:
            return self.top_k
        surplus = (len(self.routed) - self.top_k) // self.groups
        return len(self.routed) - self.groups * (surplus * step // schedule_steps)


def layer_heads(model: ModelConfig, moh: MoHConfig) -> tuple[LayerHeads, ...]:
    """The heads of each layer of a validated configuration; a dense model uses every head.

    Raises:
        UserError: shared_placement is calibrated, and the shared heads have not been measured yet.
    """
    heads, layers = model.num_attention_heads, model.num_layers
    if not moh.enabled:
        return (LayerHeads(heads, (), heads),) * layers
    assert moh.shared_heads is not None
    assert moh.active_heads is not None
    active = active_counts(moh.active_heads, heads, layers)
    groups = routing_groups(model, moh)
    return tuple(
        LayerHeads(heads, shared, count, groups)
        for shared, count in zip(_shared(model, moh, moh.shared_heads), active, strict=True)
    )


def heads_after(model: ModelConfig, moh: MoHConfig, step: int | None) -> tuple[LayerHeads, ...]:
    """``layer_heads`` after ``step`` steps of the activation schedule; None means when it has ended."""
    layers = layer_heads(model, moh)
    if step is None or not moh.enabled:
        return layers
    return tuple(heads.at(step, moh.activation_schedule_steps) for heads in layers)


def routing_groups(model: ModelConfig, moh: MoHConfig) -> int:
    """The number of routing groups in each layer: the KV groups, or one."""
    return model.query_groups if moh.enabled and moh.routing_groups == "kv" else 1


def choice_of_heads(model: ModelConfig, moh: MoHConfig) -> dict[str, Any]:
    """The keys that decide among which heads a token chooses and gates share their weight, in one form.

    A single KV group is the whole layer.
    """
    grouped = moh.routing_groups == "kv" and model.query_groups > 1
    return {
        "moh.routing_groups": "kv" if grouped else 1,
        "moh.gate_softmax": moh.gate_softmax if grouped else "layer",
    }


def even_in_kv_groups(model: ModelConfig, moh: MoHConfig) -> bool:
    """Whether every token uses the same number of heads in every KV group, as the backend ``slots`` needs."""
    return moh.enabled and routing_groups(model, moh) == model.query_groups


def active_counts(active: int | Sequence[int] | str, heads: int, layers: int) -> Sequence[int]:
    """``moh.active_heads`` as a number for each layer."""
    if isinstance(active, str):
        active = int(percentage_of(active, heads))
    return [active] * layers if isinstance(active, int) else active


def percentage_of(text: str, heads: int) -> Fraction:
    """``"75%"`` of ``heads`` as an exact fraction."""
    return Fraction(text.removesuffix("%").strip()) / 100 * heads


def active_share(model: ModelConfig, moh: MoHConfig) -> float:
    """The share of all heads of all layers that a token uses."""
    layers = layer_heads(model, moh)
    return sum(heads.active for heads in layers) / sum(heads.count for heads in layers)


def _shared(model: ModelConfig, moh: MoHConfig, shared: int | Sequence[Sequence[int]]) -> Sequence[tuple[int, ...]]:
    if not isinstance(shared, int):
        return [tuple(sorted(heads)) for heads in shared]
    heads, groups = model.num_attention_heads, model.query_groups
    if moh.shared_placement == "calibrated":
        raise UserError(
            "moh.shared_placement: calibrated needs shared heads that are measured on a dense model. Use "
            "moh-tune, which measures train.init_from, or list the heads in moh.shared_heads."
        )
    if moh.shared_placement == "first":
        return [tuple(range(shared))] * model.num_layers
    width, shared_width = heads // groups, shared // groups
    return [tuple(group * width + slot for group in range(groups) for slot in range(shared_width))] * model.num_layers
