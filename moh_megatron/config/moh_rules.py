"""Checks the rules of the section moh: which heads are possible, and which settings go together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moh_megatron.config.layer_heads import active_counts, even_in_kv_groups, percentage_of, routing_groups
from moh_megatron.config.schema import Config, MoHConfig
from moh_megatron.config.violation import Violation, nearest_multiples


def moh_violations(config: Config) -> list[Violation]:
    """Every rule that the section moh breaks; none for a dense model."""
    if not config.moh.enabled:
        return []
    return [*(list(_shape(config)) or list(_counts(config)) or _groups(config)), *_settings(config)]


def _shape(config: Config) -> Iterator[Violation]:
    """Rules that shared_heads and active_heads must satisfy before their numbers can be compared."""
    moh, model = config.moh, config.model
    heads, layers = model.num_attention_heads, model.num_layers
    shared, active = moh.shared_heads, moh.active_heads
    for key, value in (("moh.shared_heads", shared), ("moh.active_heads", active)):
        if value is None:
            yield Violation(key, f"{key} is required unless moh.enabled is false.")
        elif isinstance(value, tuple) and len(value) != layers:
            yield Violation(key, f"{key} must have an entry for each layer ({layers}). Got {len(value)}.")
    if isinstance(active, str) and percentage_of(active, heads).denominator != 1:
        exact = percentage_of(active, heads)
        yield Violation(
            "moh.active_heads",
            f"moh.active_heads must be a whole number of heads. Got {active} of {heads}, which is {float(exact):g}; "
            f"nearest: {math.floor(exact)} or {math.ceil(exact)}.",
        )
    if isinstance(shared, tuple):
        for index, layer in enumerate(shared):
            if len(set(layer)) != len(layer) or any(head >= heads for head in layer):
                yield Violation(
                    "moh.shared_heads",
                    f"moh.shared_heads[{index}] must be distinct heads below model.num_attention_heads ({heads}). "
                    f"Got {list(layer)}.",
                )
    if isinstance(shared, int) and shared > heads:
        yield Violation(
            "moh.shared_heads",
            f"moh.shared_heads must be at most model.num_attention_heads ({heads}). Got {shared}.",
        )


def _counts(config: Config) -> Iterator[Violation]:
    """The rule that every layer has heads to route, or shared heads only."""
    moh, heads, layers = config.moh, config.model.num_attention_heads, config.model.num_layers
    assert moh.shared_heads is not None
    assert moh.active_heads is not None
    active = active_counts(moh.active_heads, heads, layers)
    shared = [moh.shared_heads] * layers if isinstance(moh.shared_heads, int) else list(map(len, moh.shared_heads))
    alike = not isinstance(moh.active_heads, tuple) and not isinstance(moh.shared_heads, tuple)
    for index in range(1 if alike else layers):
        yield from _layer("" if alike else f"[{index}]", shared[index], active[index], heads, moh)
    yield from _spread(config, shared)


def _layer(index: str, shared: int, active: int, heads: int, moh: MoHConfig) -> Iterator[Violation]:
    if shared == heads:  # shared heads only
        if active != heads:
            yield Violation(
                "moh.active_heads",
                f"moh.active_heads{index} must equal model.num_attention_heads ({heads}), as moh.shared_heads does. "
                f"Got {active}.",
            )
        if moh.router == "query_norm":
            yield Violation(
                "moh.router",
                f"moh.router: query_norm needs a routed head: moh.shared_heads{index} must be less than "
                f"model.num_attention_heads ({heads}). Got {shared}.",
            )
    elif not shared < active <= heads:
        yield Violation(
            "moh.active_heads",
            f"moh.active_heads{index} must be greater than moh.shared_heads ({shared}) and at most "
            f"model.num_attention_heads ({heads}). Got {active}.",
        )


def _spread(config: Config, shared: Sequence[int]) -> Iterator[Violation]:
    moh, groups = config.moh, config.model.query_groups
    if moh.shared_placement == "first":
        return
    if isinstance(moh.shared_heads, tuple):
        yield Violation(
            "moh.shared_placement",
            f"moh.shared_placement: {moh.shared_placement} needs moh.shared_heads to be a number. Got a list for each "
            "layer, which says itself where the shared heads are; leave moh.shared_placement out.",
        )
    elif moh.shared_placement == "spread" and moh.routing_groups != "kv" and shared[0] % groups:
        yield Violation(
            "moh.shared_heads",
            f"moh.shared_heads must be a multiple of the KV groups ({groups}) with moh.shared_placement: spread. "
            f"Got {shared[0]}; nearest: {nearest_multiples(shared[0], groups)}.",
        )


def _groups(config: Config) -> Iterator[Violation]:
    """The rule that with routing_groups: kv every KV group has equally many shared and equally many active heads."""
    moh, heads, groups = config.moh, config.model.num_attention_heads, routing_groups(config.model, config.moh)
    if moh.routing_groups != "kv" or heads % groups:  # Groups that do not divide the heads are refused elsewhere.
        return
    if groups == heads:
        divisors = [number for number in range(1, heads) if heads % number == 0]
        yield Violation(
            "moh.routing_groups",
            f"moh.routing_groups: kv needs several query heads in each KV group: model.num_query_groups must be a "
            f"divisor of model.num_attention_heads ({heads}) below it{_listed(divisors[-1:])}. Got {groups} groups of "
            f"one head; or leave moh.routing_groups at 1.",
        )
        return
    assert moh.shared_heads is not None
    assert moh.active_heads is not None
    if isinstance(moh.shared_heads, tuple):
        counts = list(map(len, moh.shared_heads))
        for index, layer in enumerate(moh.shared_heads):
            held = [sum(head * groups // heads == group for head in layer) for group in range(groups)]
            if len(set(held)) > 1:
                yield Violation(
                    "moh.shared_heads",
                    f"moh.shared_heads[{index}] must have equally many heads in each of the {groups} KV groups of "
                    f"{heads // groups} heads with moh.routing_groups: kv. Got {', '.join(map(str, held))} of them in "
                    f"{list(layer)}.",
                )
    else:
        counts = [moh.shared_heads] * config.model.num_layers
        if moh.shared_placement == "first" and moh.shared_heads:
            yield Violation(
                "moh.shared_placement",
                "moh.shared_placement must be spread or calibrated with moh.routing_groups: kv, which shares equally "
                "many heads in each KV group. Got first.",
            )
        yield from _divided("moh.shared_heads", moh.shared_heads, groups, 0, heads - groups)
    per_layer = isinstance(moh.active_heads, tuple)
    active = active_counts(moh.active_heads, heads, config.model.num_layers)
    for index, count in enumerate(active if per_layer else active[:1]):
        least = min(counts[index] // groups * groups + groups, heads)
        yield from _divided(f"moh.active_heads{f'[{index}]' if per_layer else ''}", count, groups, least, heads)


def _divided(name: str, value: int, groups: int, least: int, most: int) -> Iterator[Violation]:
    """The rule that ``value`` is a multiple of ``groups`` from ``least`` to ``most``, which are multiples."""
    if value % groups == 0 and least <= value <= most:
        return
    below = value // groups * groups
    nearest = sorted({min(max(candidate, least), most) for candidate in (below, below + groups)})
    yield Violation(
        name.partition("[")[0],
        f"{name} must be a multiple of the KV groups ({groups}) from {least} to {most} with moh.routing_groups: kv. "
        f"Got {value}{_listed(nearest)}.",
    )


def _listed(nearest: Sequence[int]) -> str:
    return f"; nearest: {' or '.join(map(str, nearest))}" if nearest else ""


def _settings(config: Config) -> Iterator[Violation]:
    moh, steps = config.moh, config.train.steps
    if moh.gate_softmax == "group" and (moh.routing_groups != "kv" or moh.router != "learned"):
        yield Violation(
            "moh.gate_softmax",
            f"moh.gate_softmax: group needs moh.routing_groups: kv and moh.router: learned. Got {moh.routing_groups} "
            f"and {moh.router}.",
        )
    if moh.backend == "slots" and not even_in_kv_groups(config.model, moh):
        yield Violation(
            "moh.backend",
            f"moh.backend: slots needs equally many active heads in every KV group, by moh.routing_groups: kv. "
            f"Got {moh.routing_groups} with {config.model.query_groups} KV groups.",
        )
    if moh.router == "query_norm":
        for key, is_set in (("z_loss_coefficient", moh.z_loss_coefficient > 0), ("freeze_router", moh.freeze_router)):
            if is_set:
                yield Violation(
                    f"moh.{key}",
                    f"moh.{key} needs moh.router: learned; the query_norm router has no logits and no weights of its "
                    f"own. Got query_norm.",
                )
    if moh.straight_through == "all" and moh.router != "query_norm":
        yield Violation(
            "moh.straight_through",
            f"moh.straight_through: all needs moh.router: query_norm; the gates of the learned router are no "
            f"straight-through ones. Got {moh.router}.",
        )
    if moh.straight_through == "all" and moh.backend not in ("auto", "dense"):
        yield Violation(
            "moh.backend",
            f"moh.backend must be dense or auto with moh.straight_through: all, which computes every head. "
            f"Got {moh.backend}.",
        )
    if moh.freeze_router and moh.balancing == "bias":
        yield Violation(
            "moh.balancing",
            "moh.balancing must be loss with moh.freeze_router: biases would go on changing the routing. Got bias.",
        )
    if moh.activation_schedule_steps > steps:
        yield Violation(
            "moh.activation_schedule_steps",
            f"moh.activation_schedule_steps must be at most the run's {steps} steps. "
            f"Got {moh.activation_schedule_steps}.",
        )
