"""Runs the same weights at TP 1, TP 2 and TP 2 with sequence parallelism, for each kind of router and recomputation."""

from __future__ import annotations

import sys
from typing import Any

import tiny
import torch
import torch.distributed as dist
from support.layouts import DOUBLE, GROUPED

from moh_megatron.config.schema import Config
from moh_megatron.model.build import moh_layers
from moh_megatron.moh.balancing import update_biases
from moh_megatron.parallel import groups


def grouped(moh: dict[str, Any] | None = None, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A case with heads chosen in KV groups, and the given changes."""
    return {**GROUPED, "moh": GROUPED["moh"] | (moh or {}), **sections}


_LISTS = {"shared_heads": [[1, 4, 11, 14], []], "shared_placement": "first", "active_heads": [8, 12]}
CASES = {
    "dense": {"moh": {"enabled": False}},
    "learned": {},
    "learned_paper": {"moh": {"gating": "paper", "balance_loss": "paper"}},
    "one_shared_head": {"moh": {"shared_heads": 1}},
    "no_shared_head": {"moh": {"shared_heads": 0}},
    "query_norm": {"moh": {"router": "query_norm"}},
    "contiguous": {"moh": {"head_layout": "contiguous"}},
    "gathered": {"moh": {"backend": "gathered"}},
    "cpu": {"moh": {"backend": "cpu"}},
    "cpu_query_norm": {"moh": {"backend": "cpu", "router": "query_norm"}, "train": {"recompute": "selective"}},
    "six_groups": {
        "model": {"num_attention_heads": 12, "num_query_groups": 6, "hidden_size": 96},
        "moh": {"router": "query_norm"},
    },
    "spread": {"moh": {"shared_heads": 4, "shared_placement": "spread", "active_heads": "75%"}},
    "lists": {"moh": {"shared_heads": [[7, 0, 3], [2]], "active_heads": [6, 4], "z_loss_coefficient": 0.1}},
    "lists_query_norm": {"moh": {"shared_heads": [[6], [1, 5]], "active_heads": [4, 6], "router": "query_norm"}},
    "bias": {"moh": {"balancing": "bias", "bias_update_rate": 0.05}},
    "bias_query_norm": {"moh": {"balancing": "bias", "bias_update_rate": 0.05, "router": "query_norm"}},
    "straight_through_all": {"moh": {"router": "query_norm", "straight_through": "all"}},
    "frozen": {"moh": {"freeze_router": True}},
    "tied": {"model": {"tie_word_embeddings": True}},
    "full_recompute": {"train": {"recompute": "full"}},
    "selective_recompute": {"train": {"recompute": "selective"}},
    "documents": {"data": {"document_mask": True}},
    "documents_dense": {"data": {"document_mask": True}, "moh": {"enabled": False}},
    "documents_dense_recompute": {
        "data": {"document_mask": True},
        "moh": {"enabled": False},
        "train": {"recompute": "selective"},
    },
    "documents_query_norm": {"data": {"document_mask": True}, "moh": {"router": "query_norm"}},
    "documents_cpu": {"data": {"document_mask": True}, "moh": {"backend": "cpu"}, "train": {"recompute": "selective"}},
    "documents_full_recompute": {"data": {"document_mask": True}, "train": {"recompute": "full"}},
    "grouped": grouped(),
    "grouped_dense": grouped({"backend": "dense"}),
    "grouped_cpu": grouped({"backend": "cpu"}),
    "grouped_slots": grouped({"backend": "slots"}),
    "grouped_softmax": grouped({"gate_softmax": "group", "gating": "paper", "z_loss_coefficient": 0.1}),
    "grouped_lists": grouped(_LISTS),
    "grouped_bias": grouped({"balancing": "bias", "bias_update_rate": 0.05}),
    "grouped_query_norm": grouped({"router": "query_norm"}),
    "grouped_query_norm_dense": grouped({"router": "query_norm", "backend": "dense"}),
    "grouped_straight_through_all": grouped({"router": "query_norm", "straight_through": "all"}),
    "grouped_selective_recompute": grouped(train={"recompute": "selective"}),
    "grouped_full_recompute": grouped(train={"recompute": "full"}),
    "grouped_documents": grouped(data={"document_mask": True}),
    "grouped_documents_dense": grouped({"backend": "dense"}, data={"document_mask": True}),
}
ACCUMULATION: dict[str, Any] = {"accumulation": {}, "task_accumulation": {"balance_coefficient": 0.0}}
"""One step of four sequences, in one micro-batch and in four."""
LAYOUTS = {"tp1": {"tensor": 1}, "tp2": {"tensor": 2}, "tp2_sp": {"tensor": 2, "sequence": True}}


def biases_of_replicas(config: Config) -> dict[str, Any]:
    """Return the biases after a step in which rank 0 counted other heads than rank 1."""
    layers = moh_layers(tiny.fresh_model(config))
    counts = torch.zeros(len(layers), 8, dtype=torch.float64)
    counts[:, 2 + dist.get_rank()] = 10.0
    update_biases(layers, counts, groups.dp_group())
    return {"biases": [layer.router.bias_steps for layer in layers]}


if __name__ == "__main__":
    tiny.start()
    results = {}
    for layout, parallel in LAYOUTS.items():
        for case, sections in CASES.items():
            config = tiny.tiny_config(**sections, parallel=parallel)
            results[case, layout] = tiny.gradients_of(config)
        for case in DOUBLE:
            config = tiny.tiny_config(**CASES[case], parallel=parallel)
            results[f"{case}_float64", layout] = tiny.gradients_of(config, double=True)
        for name, moh in ACCUMULATION.items():
            for steps in (1, 4):
                config = tiny.tiny_config(parallel=parallel, moh=moh)
                results[f"{name}_{steps}", layout] = tiny.accumulated(config, tiny.tokens(4), steps)
        results["replicas", layout] = biases_of_replicas(tiny.tiny_config(**CASES["bias"], parallel=parallel))
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
