"""What upcycling costs before any tuning: loss and KL against the dense model, by active and by shared heads."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.load import config_from_mapping, mapping_of
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.calibrate import Calibration, settled
from moh_megatron.upcycle.loss_and_kl import Mean, mean, measure, upcycled

SHARES = (100, 90, 75, 50)
"""Per cent of the heads that a token uses."""
Choice = Literal["first", "spread", "calibrated", "list"]
MADE: tuple[Choice, ...] = ("first", "spread", "calibrated")
"""Choices that a number of shared heads leaves open."""


@dataclass(frozen=True)
class Row:
    """One choice of shared heads at one share."""

    choice: str
    share: int
    active: int
    shared: int
    loss: Mean
    rise: Mean
    """Above the dense model's loss, document by document."""
    divergence: Mean


def active_heads(config: Config, share: int) -> int:
    """The nearest number of heads to ``share`` per cent of them, halves upwards."""
    return int(config.model.num_attention_heads * share / 100 + 0.5)


def shared_heads(config: Config, share: int, choice: Choice) -> int | None:
    """``moh.shared_heads``, or fewer where that leaves nothing to route; None: ``choice`` cannot be made.

    Fewer are the next lower multiple of the KV groups, which every choice can share; where there is none, all active
    heads but one, which ``spread`` cannot. A list stays as it is.
    """
    asked, groups, active = config.moh.shared_heads, config.model.query_groups, active_heads(config, share)
    count = asked if isinstance(asked, int) else max(map(len, asked or ((),)))
    if count < active:
        return count
    if choice == "list":
        return None
    return (active - 1) // groups * groups or (None if choice == "spread" else active - 1)


def with_choice(config: Config, choice: Choice, share: int) -> Config | None:
    """``config`` at ``share`` per cent, with shared heads by ``choice``, calibrated ones still to be settled.

    ``list`` keeps those it has. None where so few heads leave no such choice.

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
    moh: dict[str, object] = {"enabled": True, "active_heads": active_heads(config, share), "backend": "auto"}
    moh["activation_schedule_steps"] = 0
    if choice != "list":
        moh |= {"shared_heads": count, "shared_placement": choice}
    changed = mapping_of(config)
    changed["moh"] |= moh
    return config_from_mapping(changed, f"--choices {choice}, at {share} %")


def possible(config: Config) -> list[Choice]:
    """``MADE``, without ``spread`` where ``moh.shared_heads`` is no multiple of the KV groups; of no heads, one."""
    shared, groups = config.moh.shared_heads, config.model.query_groups
    if shared == 0:
        return ["first"]
    uneven = isinstance(shared, int) and shared % groups != 0
    return [choice for choice in MADE if not (choice == "spread" and uneven)]


def planned(config: Config, choices: Sequence[Choice], shares: Sequence[int] = SHARES) -> dict[str, Config]:
    """By "choice share" what is to be compared, without what cannot be; before anything is measured.

    Raises:
        UserError: ``config`` is of a dense model; or see ``with_choice``.
    """
    if not config.moh.enabled:
        raise UserError("moh.enabled must be true: what is compared are MoH models made of a dense one. Got false.")
    made = {f"{choice} {share}": with_choice(config, choice, share) for choice in choices for share in shares}
    return {name: each for name, each in made.items() if each is not None}


def compare_choices(
    plan: Mapping[str, Config],
    dense: nn.Module,
    documents: Sequence[Tensor],
    calibration: Calibration | None = None,
) -> tuple[Mean, list[Row]]:
    """The dense loss, and a row for each entry of ``planned``, all over the same documents."""
    configs = {}
    for name, each in plan.items():
        if each.moh.shared_placement == "calibrated":
            assert calibration is not None, "measured for this choice"
            each = settled(each, calibration)
        configs[name] = each
    models: dict[tuple[object, ...], nn.Module] = {}
    variants = {}
    for name, each in configs.items():
        # The number of active heads is set for each pass: only the shared ones make a model of their own.
        key = tuple(heads.shared for heads in layer_heads(each.model, each.moh))
        if key not in models:
            models[key] = upcycled(each, dense)
            gc.collect()
        variants[name] = (models[key], layer_heads(each.model, each.moh)[0].active)
    losses, found = measure(dense, variants, documents)
    rows = []
    for name, measured in found.items():
        choice, share = name.split()
        heads = layer_heads(configs[name].model, configs[name].moh)[0]
        rise = mean([one - other for one, other in zip(measured.losses, losses, strict=True)])
        rows.append(
            Row(
                choice,
                int(share),
                heads.active,
                len(heads.shared),
                mean(measured.losses),
                rise,
                mean(measured.divergences),
            )
        )
    return mean(losses), rows


def as_markdown(dense: Mean, rows: Sequence[Row]) -> str:
    """A table; ± is the standard error over documents."""
    lines = [
        "| shared heads | active | shared | loss | above dense | KL from dense |",
        "|---|---|---|---|---|---|",
        f"| dense | | | {dense} | | |",
    ]
    lines += [
        f"| {row.choice} | {row.active} ({row.share} %) | {row.shared} | {row.loss} | {row.rise} "
        f"| {row.divergence.value:.3g} ± {row.divergence.error:.2g} |"
        for row in rows
    ]
    return "\n".join(lines)


def as_mapping(dense: Mean, rows: Sequence[Row]) -> dict[str, object]:
    """Every number, for JSON."""
    return {"dense": dataclasses.asdict(dense), "rows": [dataclasses.asdict(row) for row in rows]}
