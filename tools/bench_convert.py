#!/usr/bin/env python
"""Conversion of a LLaMA of LLaMA3-8B's shapes there and back, against cp: time, memory, and whether it is all there.

    .venv/bin/python tools/bench_convert.py --work /some/disk --layers 4 --pairs 3     # 3.8 GB, three times
    .venv/bin/python tools/bench_convert.py --work /some/disk --layers 32              # 16 GB, once

The folder of random bf16 weights is made in place. Every copy and every conversion is a command of its own, flushed to
the disk, timed from start to end; they take turns. Each direction is held against cp of the folder that it reads, and
that folder is read once before each command, so that both find it in the page cache as far as that reaches.

At most two copies of the model lie on the disk at once, three of them before the last of several pairs. The bounds
below are those of the full size on one disk; each is printed as held or missed, and a missed one ends with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from timing import markdown, median_and_range

from moh_megatron.io.hashing import hash_file
from moh_megatron.io.safetensors_stream import SafetensorsFile, SafetensorsWriter, Scratch

SCRIPT = Path(__file__).parents[1] / "pipelines" / "convert.py"
SETTINGS = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYER = {
    "input_layernorm": (4096,),
    "mlp.down_proj": (4096, 14336),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "post_attention_layernorm": (4096,),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "self_attn.q_proj": (4096, 4096),
    "self_attn.v_proj": (1024, 4096),
}
LAYERS_A_SHARD = 9
BLOCK = 1 << 25
SLOWEST, MOST_MEMORY, MOST_DISK = 3.0, 4e9, 45e9
"""Times cp, the median of pairs; bytes of a process; bytes on the disk at once."""

Step = tuple[float, int]
"""Seconds, and the largest resident memory in bytes, at least what this process had when it started the other."""


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each shard."""
    found: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (128256, 4096)}]
    for first in range(0, layers, LAYERS_A_SHARD):
        found.append(
            {
                f"model.layers.{index}.{name}.weight": shape
                for index in range(first, min(first + LAYERS_A_SHARD, layers))
                for name, shape in LAYER.items()
            }
        )
    found[-1] |= {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    return found


def make_folder(folder: Path, layers: int) -> dict[str, str]:
    """A model of random weights; returns a hash of each tensor."""
    folder.mkdir(parents=True)
    random = (0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    hashes, weight_map, parts = {}, {}, shapes(layers)
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with SafetensorsWriter(folder / file, {name: (torch.bfloat16, each) for name, each in tensors.items()}) as out:
            for name, shape in tensors.items():
                weight_map[name], digest = file, hashlib.sha256()
                left, offset = torch.Size(shape).numel(), len(hashes) * 7919 % (BLOCK // 2)
                while left:
                    piece = random[offset : offset + left]
                    digest.update(piece.view(torch.uint8).numpy().data)
                    out.append(name, piece)
                    left, offset = left - piece.numel(), 0
                hashes[name] = digest.hexdigest()
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hashes


def hashes_of(folder: Path) -> dict[str, str]:
    """Of each tensor in a folder's safetensors files."""
    found, scratch = {}, Scratch()
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            digest = hashlib.sha256()
            rows = max(1, BLOCK * entry.shape[0] // entry.nbytes)
            for start in range(0, entry.shape[0], rows):
                scratch.reset()
                piece = file.rows(name, start, min(start + rows, entry.shape[0]), scratch)
                digest.update(piece.view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()
        file.close()
    return found


def step(*command: object) -> Step:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copied(source: Path, target: Path) -> Step:
    """cp, flushed to the disk; the copy is removed."""
    read_once(source)
    taken = step("sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', source, target)
    shutil.rmtree(target)
    return taken


def converted(command: str, *, source: Path, **flags: Path) -> Step:
    """A conversion, flushed to the disk."""
    read_once(source)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return step(sys.executable, SCRIPT, command, *words)


def read_once(folder: Path) -> None:
    """Bring it into the page cache, as far as that reaches."""
    for file in folder.rglob("*"):
        if file.is_file():
            hash_file(file)


def lying(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def judged(what: str, value: float, bound: float, unit: str) -> bool:
    """Say whether a value is at most its bound."""
    held = value <= bound
    print(f"{what}: {value:.2f} {unit}, at most {bound:.2f}: {'held' if held else 'MISSED'}")
    return held


def row(name: str, steps: Sequence[Step], copies: Sequence[Step]) -> list[str]:
    over = [taken / copy for (taken, _), (copy, _) in zip(steps, copies, strict=True)]
    peak = max(memory for _, memory in steps) / 1e9
    seconds = median_and_range([taken for taken, _ in steps], 1)
    return [name, seconds, median_and_range([copy for copy, _ in copies], 1), median_and_range(over), f"{peak:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Conversion of LLaMA3-8B's shapes there and back, against cp.")
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    there, back, of_source, of_native, disk = [], [], [], [], 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        source, native, returned, copy = (Path(name) / each for each in ("source", "native", "returned", "copy"))
        expected = make_folder(source, arguments.layers)
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        for turn in range(arguments.pairs):
            of_source.append(copied(source, copy))
            there.append(converted("hf-to-megatron", source=source, hf_dir=source, save_dir=native))
            disk = max(disk, lying(Path(name)))
            if turn == arguments.pairs - 1:
                shutil.rmtree(source)
            of_native.append(copied(native, copy))
            back.append(converted("megatron-to-hf", source=native, load_dir=native, hf_dir=returned))
            disk = max(disk, lying(Path(name)))
            shutil.rmtree(native)
            if hashes_of(returned) != expected:
                raise SystemExit("tensors came back changed")
            shutil.rmtree(returned)
    print(f"{nbytes / 1e9:.1f} GB, {arguments.pairs} pair(s), every tensor came back bit for bit\n")
    head = ["direction", "seconds", "cp", "over cp", "peak memory, GB"]
    ways = {"hf-to-megatron": (there, of_source), "megatron-to-hf": (back, of_native)}
    print(markdown(head, [row(way, *both) for way, both in ways.items()]))
    print()
    held = [judged("on the disk at once", disk / 1e9, MOST_DISK / 1e9, "GB")]
    for way, (steps, copies) in ways.items():
        over = median([taken / copy for (taken, _), (copy, _) in zip(steps, copies, strict=True)])
        held.append(judged(f"{way}, time over cp", over, SLOWEST, "times"))
        held.append(judged(f"{way}, peak memory", max(memory for _, memory in steps) / 1e9, MOST_MEMORY / 1e9, "GB"))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
