"""Runs every case of one world size, and the plain loops that they are compared with."""

from __future__ import annotations

import sys
from typing import Any

import engine
import tiny
import torch
import torch.distributed as dist
from support.engine_table import CASES, LAYOUTS, REFERENCES, STEPS, VARIANTS, reference, sections

from moh_megatron.checkpoint.mapping import rules, split_shard
from moh_megatron.config.schema import Config
from moh_megatron.parallel import groups
from moh_megatron.train.engine import adamw


def weight_errors(
    config: Config, ours: dict[str, torch.Tensor], reference_weights: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return how far each weight of this tensor-parallel rank is from the reference, relative to the latter's norm."""
    group, errors = groups.tp_group(), dict[str, float]()
    for rule in rules(config):
        expected = split_shard(
            reference_weights[rule.megatron], rule.dim, rule.stride, group.rank(), group.size()
        ).float()
        errors[rule.megatron] = float((ours[rule.megatron] - expected).norm() / expected.norm())
    return errors


def sgd(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.optimizer.learning_rate)


if __name__ == "__main__":
    world = engine.join()
    results: dict[Any, Any] = {}
    for layout, of_layout in LAYOUTS[world.size].items():
        for variant in REFERENCES:
            if (key := reference(layout, variant)) not in results:
                config = tiny.tiny_config(**VARIANTS[variant], train=of_layout["train"])
                results[key] = engine.plain_loop(config, sgd if variant == "sgd" else adamw, STEPS)
    for size, layout, stage, variant in CASES:
        if size == world.size:
            config = tiny.tiny_config(**sections(size, layout, stage, variant))
            found = engine.engine_loop(config, sgd if variant.startswith("sgd") else adamw, STEPS)
            full_tensors = results[reference(layout, variant)]["weights"]
            found["weight_errors"] = weight_errors(config, found.pop("weights"), full_tensors)
            results[layout, stage, variant] = found
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
