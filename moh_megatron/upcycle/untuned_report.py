"""Reports what upcycling costs before any tuning: loss and KL against the dense model, by active and shared heads.

Heads are chosen among all of a layer, and in each KV group where these have equally many shared and active heads.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from moh_megatron.config.layer_heads import active_counts, layer_heads, routing_groups
from moh_megatron.config.load import config_from_mapping, mapping_of
from moh_megatron.config.moh_rules import moh_violations
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.calibrate import Calibration, with_calibrated_heads
from moh_megatron.upcycle.loss_and_kl import Mean, mean, measure_loss_and_kl, upcycled_model

SHARES = (100, 90, 75, 50)
"""Shares of the heads that a token uses, in per cent."""
Choice = Literal["first", "spread", "calibrated", "list"]
PLACEMENTS: tuple[Choice, ...] = ("first", "spread", "calibrated")
"""Choices where moh.shared_heads is a number: the values of moh.shared_placement."""
Scope = Literal["global", "grouped"]
SCOPES: tuple[Scope, ...] = ("global", "grouped")
"""Where a token chooses: among all heads of a layer, or equally many in each KV group; see moh.routing_groups."""


@dataclass(frozen=True)
class Row:
    """The result of one choice of shared heads at one share of active heads."""

    scope: str
    choice: str
    share: int
    active: int
    shared: int
    loss: Mean
    rise: Mean
    """The difference to the dense model's loss, document by document."""
    divergence: Mean


def active_heads(config: Config, share: int) -> int:
    """``share`` per cent of the heads, rounded to the nearest number, halves up."""
    return int(config.model.num_attention_heads * share / 100 + 0.5)


def shared_heads(config: Config, share: int, choice: Choice) -> int | None:
    """The number of shared heads: ``moh.shared_heads``, or fewer where that would leave no head to route.

    Fewer means the next lower multiple of the KV groups, which every choice can share; where there is none, all active
    heads but one, which ``spread`` cannot share. A list stays as it is. None where ``choice`` is impossible.
    """
    configured, groups, active = config.moh.shared_heads, config.model.query_groups, active_heads(config, share)
    count = configured if isinstance(configured, int) else max(map(len, configured or ((),)))
    if count < active:
        return count
    if choice == "list":
        return None
    return (active - 1) // groups * groups or (None if choice == "spread" else active - 1)


def compared_shares(config: Config) -> list[int]:
    """``SHARES``, and the configured share of active heads where it is the same in every layer, in falling order."""
    assert config.moh.active_heads is not None, "checked with the configuration"
    heads = config.model.num_attention_heads
    configured = set(active_counts(config.moh.active_heads, heads, config.model.num_layers))
    known = {active_heads(config, share) for share in SHARES}
    more = [round(100 * count / heads) for count in configured - known] if len(configured) == 1 else []
    return sorted({*SHARES, *more}, reverse=True)


def with_choice(config: Config, choice: Choice, share: int, scope: Scope = "global") -> Config | None:
    """``config`` with ``share`` per cent of active heads, chosen in ``scope``, and with shared heads by ``choice``.

    The choice ``list`` keeps the configured heads; calibrated heads are still to be measured. None where so few active
    heads leave no such choice, or where active and shared heads do not divide evenly over the KV groups of ``grouped``.

    Raises:
        UserError: ``config`` allows no such choice.
    """
    if choice == "list" and not isinstance(config.moh.shared_heads, tuple):
        raise UserError(
            f"--choices list needs moh.shared_heads to list heads for each layer. Got {config.moh.shared_heads}; leave "
            "list out, or list them."
        )
    if (count := shared_heads(config, share, choice)) is None:
        return None
    grouped = scope == "grouped"
    moh: dict[str, Any] = {"enabled": True, "active_heads": active_heads(config, share), "backend": "auto"}
    moh |= {"activation_schedule_steps": 0, "routing_groups": "kv" if grouped else 1}
    moh |= {"gate_softmax": config.moh.gate_softmax if grouped else "layer"}
    if choice != "list":
        moh |= {"shared_heads": count, "shared_placement": choice}
    changed = dataclasses.replace(config, moh=dataclasses.replace(config.moh, **moh))
    if grouped and (routing_groups(changed.model, changed.moh) == 1 or moh_violations(changed)):
        return None
    return config_from_mapping(mapping_of(changed), f"--choices {choice}, at {share} %")


def possible_choices(config: Config) -> list[Choice]:
    """``PLACEMENTS``, without ``spread`` where ``moh.shared_heads`` is no multiple of the KV groups.

    Without shared heads all placements are the same, and one is given.
    """
    shared, groups = config.moh.shared_heads, config.model.query_groups
    if shared == 0:
        return ["first"]
    uneven = isinstance(shared, int) and shared % groups != 0
    return [choice for choice in PLACEMENTS if not (choice == "spread" and uneven)]


def plan_comparison(config: Config, choices: Sequence[Choice], shares: Sequence[int] = SHARES) -> dict[str, Config]:
    """The configurations to compare, by "scope choice share"; impossible ones are left out. Nothing is measured yet.

    Raises:
        UserError: ``config`` is of a dense model; or see ``with_choice``.
    """
    if not config.moh.enabled:
        raise UserError("moh.enabled must be true: what is compared are MoH models made of a dense one. Got false.")
    variants = {
        f"{scope} {choice} {share}": with_choice(config, choice, share, scope)
        for scope, choice, share in itertools.product(SCOPES, choices, shares)
    }
    return {name: variant for name, variant in variants.items() if variant is not None}


def omissions(
    config: Config, plan: Mapping[str, Config], choices: Sequence[Choice], shares: Sequence[int]
) -> list[str]:
    """A sentence for each scope of which ``plan`` lacks some of the ``choices`` at some of the ``shares``.

    Where no choice can be grouped, because a KV group has a single head or all, none is missed.
    """
    groups, sentences = config.model.query_groups, []
    reasons = {"global": "Left out, because so many shared heads leave no such choice"}
    if 1 < groups < config.model.num_attention_heads:
        reasons["grouped"] = f"Not grouped, because {groups} KV groups need equally many shared and active heads each"
    for scope, reason in reasons.items():
        missing = []
        for choice in choices:
            if left_out := [str(share) for share in shares if f"{scope} {choice} {share}" not in plan]:
                missing.append(f"{choice} at {', '.join(left_out)} %")
        if missing:
            sentences.append(f"{reason}: {'; '.join(missing)}.")
    return sentences


def compare_choices(
    plan: Mapping[str, Config],
    dense: nn.Module,
    documents: Sequence[Tensor],
    calibration: Calibration | None = None,
) -> tuple[Mean, list[Row]]:
    """The dense model's loss, and a row for each entry of ``plan_comparison``, all over the same documents."""
    configs = {}
    for name, config in plan.items():
        if config.moh.shared_placement == "calibrated":
            assert calibration is not None, "measured for this choice"
            config = with_calibrated_heads(config, calibration)
        configs[name] = config
    models: dict[tuple[object, ...], nn.Module] = {}
    variants = {}
    for name, config in configs.items():
        # The number of active heads is set for each pass, so variants with the same shared heads use one model.
        key = tuple((heads.shared, heads.groups) for heads in layer_heads(config.model, config.moh))
        if key not in models:
            models[key] = upcycled_model(config, dense)
            gc.collect()
        variants[name] = (models[key], layer_heads(config.model, config.moh)[0].active)
    dense_losses, values = measure_loss_and_kl(dense, variants, documents)
    rows = []
    for name, measured in values.items():
        scope, choice, share = name.split()
        heads = layer_heads(configs[name].model, configs[name].moh)[0]
        rise = mean([loss - dense_loss for loss, dense_loss in zip(measured.losses, dense_losses, strict=True)])
        rows.append(
            Row(
                scope,
                choice,
                int(share),
                heads.active,
                len(heads.shared),
                mean(measured.losses),
                rise,
                mean(measured.divergences),
            )
        )
    return mean(dense_losses), rows


def as_markdown(dense: Mean, rows: Sequence[Row]) -> str:
    """A Markdown table; ± is the standard error over documents."""
    lines = [
        "| choice | shared heads | active | shared | loss | above dense | KL from dense |",
        "|---|---|---|---|---|---|---|",
        f"| dense | | | | {dense} | | |",
    ]
    lines += [
        f"| {row.scope} | {row.choice} | {row.active} ({row.share} %) | {row.shared} | {row.loss} | {row.rise} "
        f"| {row.divergence.value:.3g} ± {row.divergence.error:.2g} |"
        for row in rows
    ]
    return "\n".join(lines)


def as_mapping(dense: Mean, rows: Sequence[Row]) -> dict[str, object]:
    """All numbers, for a JSON file."""
    return {"dense": dataclasses.asdict(dense), "rows": [dataclasses.asdict(row) for row in rows]}
