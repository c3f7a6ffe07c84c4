"""Runs TP 4, TP 4 with sequence parallelism and TP 2 x DP 2 on four ranks."""

from __future__ import annotations

import sys
from typing import Any

import engine
import tiny
import torch
import torch.distributed as dist
from layouts import CASES

# Six KV groups cannot be sharded over four ranks.
FOUR_RANKS = [case for case in CASES if case != "six_groups"]
LAYOUTS = {"tp1": {"tensor": 1}, "tp4": {"tensor": 4}, "tp4_sp": {"tensor": 4, "sequence": True}}

if __name__ == "__main__":
    engine.join()
    results: dict[Any, Any] = {}
    for layout, parallel in LAYOUTS.items():
        for case in FOUR_RANKS:
            sections = CASES[case]
            config = tiny.tiny_config(**sections, parallel=parallel)
            results[case, layout] = tiny.gradients_of(config)
    engines: dict[str, Any] = {"plain": engine.plain_loop(tiny.tiny_config())}
    for stage in (0, 1, 2, 3):
        for sequence in (False, True):
            name = f"tp2_dp2_zero{stage}{'_sp' if sequence else ''}"
            engines[name] = engine.engine_loop(
                tiny.tiny_config(parallel={"tensor": 2, "sequence": sequence, "zero_stage": stage})
            )
    torch.save({"layouts": results, "engines": engines}, sys.argv[1])
    dist.destroy_process_group()
