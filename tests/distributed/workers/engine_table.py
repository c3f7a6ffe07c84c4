"""Every case of one world size, and the bare loops they are held against."""

from __future__ import annotations

import sys
from typing import Any

import engine
import tiny
import torch
import torch.distributed as dist
from support.engine_table import CASES, LAYOUTS, STEPS, VARIANTS, reference, sections

from moh_megatron.config.schema import Config
from moh_megatron.train.engine import adamw


def sgd(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.optimizer.learning_rate)


if __name__ == "__main__":
    world = engine.joined()
    results: dict[Any, Any] = {}
    for layout, of_layout in LAYOUTS[world.size].items():
        for variant in ("adam", "sgd", "tied"):
            if (key := reference(layout, variant)) not in results:
                config = tiny.tiny_config(**VARIANTS[variant], train=of_layout["train"])
                results[key] = engine.bare_loop(config, sgd if variant == "sgd" else adamw, STEPS)
    for size, layout, stage, variant in CASES:
        if size == world.size:
            config = tiny.tiny_config(**sections(size, layout, stage, variant))
            make_optimizer = sgd if variant == "sgd" else adamw
            results[layout, stage, variant] = engine.engine_loop(config, make_optimizer, STEPS)
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
