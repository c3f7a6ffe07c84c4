"""The same weights at TP 1, TP 2 and TP 2 with sequence parallelism, for each kind of router and recomputation."""

from __future__ import annotations

import sys

import tiny
import torch
import torch.distributed as dist

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
}
LAYOUTS = {"tp1": {"tensor": 1}, "tp2": {"tensor": 2}, "tp2_sp": {"tensor": 2, "sequence": True}}

if __name__ == "__main__":
    tiny.start()
    results = {}
    for layout, parallel in LAYOUTS.items():
        for case, sections in CASES.items():
            config = tiny.tiny_config(**sections, parallel=parallel)
            results[case, layout] = tiny.gradients_of(config)
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
