"""Finds the single settings that save most memory on a rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import violations
from moh_megatron.io.errors import UserError
from moh_megatron.plan.run_plan import make_plan

_RANKS_OF_A_NODE = 8
"""The largest tensor-parallel size that is advised."""


@dataclass(frozen=True)
class Remedy:
    """A setting, its new value, and the bytes a rank would then need."""

    key: str
    value: Any
    device_bytes: int


def remedies(config: Config, world_size: int) -> list[Remedy]:
    """The best value of each setting that saves memory, the setting that saves most first."""
    current = make_plan(config, world_size).device_bytes
    best: dict[str, Remedy] = {}
    for key, value in _candidates(config):
        section, _, name = key.partition(".")
        changed = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
        if violations(changed):
            continue
        try:
            needed = make_plan(changed, world_size).device_bytes
        except UserError:
            continue
        if needed < best.get(key, Remedy(key, None, current)).device_bytes:
            best[key] = Remedy(key, value, needed)
    return sorted(best.values(), key=lambda remedy: remedy.device_bytes)


def _candidates(config: Config) -> Iterator[tuple[str, Any]]:
    parallel, train = config.parallel, config.train
    yield from (("parallel.zero_stage", stage) for stage in range(parallel.zero_stage + 1, 4))
    yield from (("parallel.tensor", size) for size in range(parallel.tensor + 1, _RANKS_OF_A_NODE + 1))
    yield "parallel.sequence", True
    yield "parallel.offload_optimizer", True
    yield from (("train.recompute", kind) for kind in ("selective", "full"))
    sizes = range(1, train.micro_batch_size)
    yield from (("train.micro_batch_size", size) for size in sizes if train.micro_batch_size % size == 0)
