"""Trains two steps at each of RESHARD_LAYOUTS, passing the checkpoint on in RESHARD_FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoints import config_of, save, start_engine, train

from moh_megatron.checkpoint.layout import step_folders
from moh_megatron.train.engine import initialize_distributed
from moh_megatron.train.fault_tolerance.world import World

STEPS = 2

if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    assert world is not None
    initialize_distributed(world)
    folder, layouts = Path(os.environ["RESHARD_FOLDER"]), json.loads(os.environ["RESHARD_LAYOUTS"])
    curve: list[tuple[float, float]] = []
    same: list[tuple[Any, Any]] = []  # the step after a layout, and that of a new engine from the checkpoint
    for tensor, stage in layouts:
        config = config_of(tensor, stage)
        newest = next(iter(step_folders(folder)), None)
        first = 0 if newest is None else int(newest.name.removeprefix("step_"))
        engine = start_engine(config, newest)
        curve += train(engine, config, first, first + STEPS)
        saved = save(engine, config, folder, first + STEPS)
        continued = train(engine, config, first + STEPS, first + STEPS + 1)
        same.append((continued, train(start_engine(config, saved), config, first + STEPS, first + STEPS + 1)))
    uninterrupted: list[tuple[float, float]] = []
    if length := int(os.environ.get("RESHARD_UNINTERRUPTED", "0")):
        config = config_of(*layouts[0])
        uninterrupted = train(start_engine(config), config, 0, length)
    torch.save({"curve": curve, "same": same, "uninterrupted": uninterrupted}, sys.argv[1])
    dist.destroy_process_group()
