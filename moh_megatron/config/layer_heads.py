"""Which heads each layer shares and how many it uses: the one reading of moh.shared_heads and moh.active_heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from moh_megatron.config.schema import ModelConfig, MoHConfig
from moh_megatron.io.errors import UserError


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer, by their logical numbers."""

    count: int
    """Query heads."""
    shared: tuple[int, ...]
    """Used by every token, in rising order."""
    active: int
    """Used by a token, the shared ones included, when the activation schedule has run out."""

    @cached_property
    def routed(self) -> tuple[int, ...]:
        """The others, in rising order."""
        return tuple(sorted(set(range(self.count)) - set(self.shared)))

    @property
    def order(self) -> tuple[int, ...]:
        """The heads as a router numbers them: shared ones first."""
        return (*self.shared, *self.routed)

    @property
    def top_k(self) -> int:
        """Routed heads a token uses."""
        return self.active - len(self.shared)

    def at(self, step: int, schedule_steps: int) -> LayerHeads:
        """These heads after ``step`` steps of a schedule as in ``top_k_at``."""
        return replace(self, active=len(self.shared) + self.top_k_at(step, schedule_steps))

    def top_k_at(self, step: int, schedule_steps: int) -> int:
        """Routed heads a token uses after ``step`` steps of a schedule that goes from all of them down to ``top_k``."""
        if step >= schedule_steps:
            return self.top_k
        surplus = len(self.routed) - self.top_k
        return len(self.routed) - surplus * step // schedule_steps


def layer_heads(model: ModelConfig, moh: MoHConfig) -> tuple[LayerHeads, ...]:
    """One entry a layer, of a validated configuration; a dense model uses every head.

    Raises:
        UserError: which heads are shared is still to be measured.
    """
    heads, layers = model.num_attention_heads, model.num_layers
    if not moh.enabled:
        return (LayerHeads(heads, (), heads),) * layers
    assert moh.shared_heads is not None
    assert moh.active_heads is not None
    active = active_counts(moh.active_heads, heads, layers)
    return tuple(
        LayerHeads(heads, shared, count)
        for shared, count in zip(_shared(model, moh, moh.shared_heads), active, strict=True)
    )


def heads_after(model: ModelConfig, moh: MoHConfig, step: int | None) -> tuple[LayerHeads, ...]:
    """As ``layer_heads``, with the heads a token uses after ``step`` steps; None: when the schedule has run out."""
    layers = layer_heads(model, moh)
    if step is None or not moh.enabled:
        return layers
    return tuple(heads.at(step, moh.activation_schedule_steps) for heads in layers)


def active_counts(active: int | Sequence[int] | str, heads: int, layers: int) -> Sequence[int]:
    """``moh.active_heads`` as a number for each layer."""
    if isinstance(active, str):
        active = int(percentage_of(active, heads))
    return [active] * layers if isinstance(active, int) else active


def percentage_of(text: str, heads: int) -> Fraction:
    """``"75%"`` of ``heads``, exactly; it may not be a whole number."""
    return Fraction(text.removesuffix("%").strip()) / 100 * heads


def active_share(model: ModelConfig, moh: MoHConfig) -> float:
    """The share of all heads of all layers that a token uses."""
    layers = layer_heads(model, moh)
    return sum(each.active for each in layers) / sum(each.count for each in layers)


def _shared(model: ModelConfig, moh: MoHConfig, shared: int | Sequence[Sequence[int]]) -> Sequence[tuple[int, ...]]:
    if not isinstance(shared, int):
        return [tuple(sorted(each)) for each in shared]
    heads, groups = model.num_attention_heads, model.query_groups
    if moh.shared_placement == "calibrated":
        raise UserError(
            "moh.shared_placement: calibrated is not settled before a dense model has been measured. Use "
            "pipelines/continue_tune.py, which measures train.init_from, or list the heads in moh.shared_heads."
        )
    if moh.shared_placement == "first":
        return [tuple(range(shared))] * model.num_layers
    width, each = heads // groups, shared // groups
    return [tuple(group * width + slot for group in range(groups) for slot in range(each))] * model.num_layers
