"""Runs nine heads in three KV groups at TP 1 and TP 3."""

from __future__ import annotations

import sys
from typing import Any

import tiny
import torch
import torch.distributed as dist

SHAPE = {"num_attention_heads": 9, "num_query_groups": 3, "hidden_size": 72}
ROUTERS: dict[str, dict[str, Any]] = {
    "learned": {"moh": {"shared_heads": 3}},
    "query_norm": {"moh": {"router": "query_norm", "shared_heads": 3}},
}

if __name__ == "__main__":
    tiny.start()
    results = {}
    for case, sections in ROUTERS.items():
        for size in (1, 3):
            config = tiny.tiny_config(**sections, model=SHAPE, parallel={"tensor": size})
            results[case, f"tp{size}"] = tiny.gradients(tiny.fresh_model(config), tiny.tokens(2))
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
