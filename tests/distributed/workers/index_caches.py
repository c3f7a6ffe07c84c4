"""Two ranks build index caches on a shared file system, and as two nodes that share none."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from moh_megatron.config.load import config_from_mapping
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset import build_train_dataset
from moh_megatron.data.index_cache import IndexCache, build_once
from moh_megatron.data.prepare.pipeline import prepare
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.io.errors import Fault


def make_config(folder: Path, data: Path) -> Config:
    text = folder / "text.jsonl"
    if not text.exists():
        words = [
            "the",
            "quick",
            "brown",
            "fox",
            "jumps",
            "over",
            "a",
            "lazy",
            "dog",
            "while",
            "seven",
            "wizards",
            "brew",
        ]
        lines = [" ".join(words[n % 13 :] + words[: n % 7] + [str(n)]) for n in range(200)]
        text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return config_from_mapping(
        {
            "run": {"dir": str(folder / "run")},
            "model": {
                "num_layers": 1,
                "hidden_size": 8,
                "ffn_hidden_size": 8,
                "num_attention_heads": 2,
                "vocab_size": 320,
            },
            "moh": {"enabled": False},
            "data": {"inputs": [str(text)], "dir": str(data), "validation_fraction": 0.2},
            "train": {"sequence_length": 16, "total_tokens": 64 * 200, "global_batch_size": 4},
            "optimizer": {"learning_rate": 1e-3},
        },
        "test",
    )


def sampled_tokens(config: Config) -> list[list[int]]:
    data = load_prepared(config)
    dataset = build_train_dataset(config, data, data.tokenizer())
    return [dataset[index].tolist() for index in range(0, len(dataset), 9)]


def main(result: Path) -> None:
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), result.parent
    built: list[int] = []

    def make(cache: Path) -> None:
        built.append(rank)
        (cache / "rank").write_text(str(rank))

    probe = folder / "caches" / "probe"
    build_once([IndexCache(probe, make)])
    config = make_config(folder, folder / "shared") if rank == 0 else None
    if config is not None:
        prepare(config)
        for node in range(2):
            shutil.copytree(folder / "shared", folder / f"node{node}")
    dist.barrier()
    shared = make_config(folder, folder / "shared")
    own = replace(shared, data=replace(shared.data, dir=str(folder / f"node{rank}")))
    found = {"shared": sampled_tokens(shared), "built": built, "rank_in_cache": (probe / "rank").read_text()}
    socket.gethostname = lambda: f"node{rank}"
    found["own"] = sampled_tokens(own)
    found["caches"] = sorted(str(path.relative_to(folder)) for path in folder.glob("node*/cache/*/*/complete"))
    dist.barrier()  # the next caches of the other node must not be counted
    broken = replace(own, train=replace(own.train, sequence_length=8))
    blocked = folder / f"node{rank}" / "cache" / "train-8-1234"
    if rank == 1:
        blocked.write_text("a file where a folder is needed")
    try:
        sampled_tokens(broken)
        found["fault"] = ""
    except Fault as error:
        found["fault"] = str(error)
    torch.save(found, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
