"""What upcycling costs before any tuning: loss and KL against the dense model, by active and by shared heads."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from moh_megatron.config.errors import UserError
from moh_megatron.config.heads import layer_heads
from moh_megatron.config.load import config_from_mapping, mapping_of
from moh_megatron.config.schema import Config
from moh_megatron.upcycle.calibrate import Calibration, settled
from moh_megatron.upcycle.compare import Mean, mean, measure, upcycled

SHARES = (100, 90, 75, 50)
"""Per cent of the heads that a token uses."""
Choice = Literal["first", "spread", "calibrated", "list"]


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


def shared_heads(config: Config, share: int) -> int:
    """``moh.shared_heads``; where that leaves nothing to route, the next lower multiple of the KV groups that does.

    Raises:
        UserError: there is none.
    """
    asked, groups, active = config.moh.shared_heads, config.model.query_groups, active_heads(config, share)
    count = asked if isinstance(asked, int) else max(map(len, asked or ((),)))
    if count < active:
        return count
    if (fewer := (active - 1) // groups * groups) < 1:
        raise UserError(f"moh.shared_heads must be below the {active} heads of {share} %. Got {count}.")
    return fewer


def with_choice(config: Config, choice: Choice, share: int, calibration: Calibration | None) -> Config:
    """``config`` at ``share`` per cent, with shared heads by ``choice``; ``list`` keeps those it has.

    Raises:
        UserError: they cannot be chosen so.
    """
    moh: dict[str, object] = {"enabled": True, "active_heads": active_heads(config, share), "backend": "auto"}
    moh["activation_schedule_steps"] = 0
    if choice != "list":
        moh |= {"shared_heads": shared_heads(config, share), "shared_placement": choice}
    changed = mapping_of(config)
    changed["moh"] |= moh
    checked = config_from_mapping(changed, f"shared heads by choice of {choice}, at {share} %")
    if choice != "calibrated":
        return checked
    assert calibration is not None, "measured for this choice"
    return settled(checked, calibration)


def compare_choices(
    config: Config,
    dense: nn.Module,
    documents: Sequence[Tensor],
    choices: Sequence[Choice],
    calibration: Calibration | None = None,
    shares: Sequence[int] = SHARES,
) -> tuple[Mean, list[Row]]:
    """The dense loss, and a row for each choice at each share, all over the same documents."""
    configs = {
        f"{choice} {share}": with_choice(config, choice, share, calibration) for choice in choices for share in shares
    }
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
