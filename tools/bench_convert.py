#!/usr/bin/env python
"""Measures the conversion of a LLaMA of LLaMA3-8B's shapes in both directions against cp: time, memory, equality.

    .venv/bin/python tools/bench_convert.py --work /some/disk --layers 4 --pairs 3     # 3.8 GB, three times
    .venv/bin/python tools/bench_convert.py --work /some/disk --layers 32              # 16 GB, once

The folder of random bf16 weights is created first. Copies and conversions alternate; each is a command of its own,
flushed to the disk and timed from start to end. Each direction is compared with cp of the folder that it reads. That
folder is read once before each command, so that both find it in the page cache if it fits.

At most two copies of the model are on the disk at once, and three before the last of several pairs. The bounds below
are for the full size on one disk. Each is printed as held or missed, and a missed one ends with exit code 1.
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
LAYERS_PER_SHARD = 9
BLOCK = 1 << 25
MAX_RATIO, MAX_MEMORY, MAX_DISK = 3.0, 4e9, 45e9
"""The median of the time over that of cp; bytes of a process; bytes on the disk at once."""

Step = tuple[float, int]
"""Seconds, and the peak resident memory in bytes, which includes that of this process when it started the other."""


def shapes(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in each file."""
    found: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (128256, 4096)}]
    for first in range(0, layers, LAYERS_PER_SHARD):
        found.append(
            {
                f"model.layers.{index}.{name}.weight": shape
                for index in range(first, min(first + LAYERS_PER_SHARD, layers))
                for name, shape in LAYER.items()
            }
        )
    found[-1] |= {"model.norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    return found


def make_folder(folder: Path, layers: int) -> dict[str, str]:
    """Write a model of random weights; returns a hash of each tensor."""
    folder.mkdir(parents=True)
    random = (0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    hashes, weight_map, parts = {}, {}, shapes(layers)
    for number, tensors in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with SafetensorsWriter(
            folder / file, {name: (torch.bfloat16, shape) for name, shape in tensors.items()}
        ) as out:
            for name, shape in tensors.items():
                weight_map[name], digest = file, hashlib.sha256()
                left, offset = torch.Size(shape).numel(), len(hashes) * 7919 % (BLOCK // 2)
                while left:
                    chunk = random[offset : offset + left]
                    digest.update(chunk.view(torch.uint8).numpy().data)
                    out.append(name, chunk)
                    left, offset = left - chunk.numel(), 0
                hashes[name] = digest.hexdigest()
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return hashes


def hashes_of(folder: Path) -> dict[str, str]:
    """A hash of each tensor in a folder's safetensors files."""
    found, scratch = {}, Scratch()
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            digest = hashlib.sha256()
            rows = max(1, BLOCK * entry.shape[0] // entry.nbytes)
            for start in range(0, entry.shape[0], rows):
                scratch.reset()
                chunk = file.rows(name, start, min(start + rows, entry.shape[0]), scratch)
                digest.update(chunk.view(torch.uint8).numpy().data)
            found[name] = digest.hexdigest()
        file.close()
    return found


def run_command(*command: object) -> Step:
    """Run a command until it ends."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def run_copy(source: Path, target: Path) -> Step:
    """Run cp and flush the copy to the disk; the copy is then removed."""
    read_once(source)
    taken = run_command("sh", "-c", 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +', source, target)
    shutil.rmtree(target)
    return taken


def run_conversion(command: str, *, source: Path, **flags: Path) -> Step:
    """Run a conversion, which flushes what it writes to the disk."""
    read_once(source)
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    return run_command(sys.executable, SCRIPT, command, *words)


def read_once(folder: Path) -> None:
    """Read all files of ``folder`` into the page cache, as far as they fit."""
    for file in folder.rglob("*"):
        if file.is_file():
            hash_file(file)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_bound(what: str, value: float, bound: float, unit: str) -> bool:
    """Print whether a value is at most its bound, and return it."""
    held = value <= bound
    print(f"{what}: {value:.2f} {unit}, at most {bound:.2f}: {'held' if held else 'MISSED'}")
    return held


def row(name: str, steps: Sequence[Step], copies: Sequence[Step]) -> list[str]:
    over = [taken / copy for (taken, _), (copy, _) in zip(steps, copies, strict=True)]
    peak = max(memory for _, memory in steps) / 1e9
    seconds = median_and_range([taken for taken, _ in steps], 1)
    return [name, seconds, median_and_range([copy for copy, _ in copies], 1), median_and_range(over), f"{peak:.2f}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure the conversion of LLaMA3-8B's shapes in both directions against cp."
    )
    parser.add_argument("--work", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=1)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    imports, exports, source_copies, checkpoint_copies, disk = [], [], [], [], 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        source, checkpoint, returned, copy = (
            Path(name) / folder for folder in ("source", "checkpoint", "returned", "copy")
        )
        expected = make_folder(source, arguments.layers)
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        for turn in range(arguments.pairs):
            source_copies.append(run_copy(source, copy))
            imports.append(run_conversion("hf-to-megatron", source=source, hf_dir=source, save_dir=checkpoint))
            disk = max(disk, folder_bytes(Path(name)))
            if turn == arguments.pairs - 1:
                shutil.rmtree(source)
            checkpoint_copies.append(run_copy(checkpoint, copy))
            exports.append(run_conversion("megatron-to-hf", source=checkpoint, load_dir=checkpoint, hf_dir=returned))
            disk = max(disk, folder_bytes(Path(name)))
            shutil.rmtree(checkpoint)
            if hashes_of(returned) != expected:
                raise SystemExit("tensors came back changed")
            shutil.rmtree(returned)
    print(f"{nbytes / 1e9:.1f} GB, {arguments.pairs} pair(s), every tensor came back bit for bit\n")
    head = ["direction", "seconds", "cp", "over cp", "peak memory, GB"]
    directions = {"hf-to-megatron": (imports, source_copies), "megatron-to-hf": (exports, checkpoint_copies)}
    print(markdown(head, [row(direction, *both) for direction, both in directions.items()]))
    print()
    held = [check_bound("on the disk at once", disk / 1e9, MAX_DISK / 1e9, "GB")]
    for direction, (steps, copies) in directions.items():
        over = median([taken / copy for (taken, _), (copy, _) in zip(steps, copies, strict=True)])
        held.append(check_bound(f"{direction}, time over cp", over, MAX_RATIO, "times"))
        held.append(
            check_bound(f"{direction}, peak memory", max(memory for _, memory in steps) / 1e9, MAX_MEMORY / 1e9, "GB")
        )
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
