#!/usr/bin/env python
"""Compares the speed of prepare_data with a bare encode_batch_fast loop on the same text, in alternating processes.

.venv/bin/python tools/bench_data.py CORPUS.jsonl TOKENIZER [--repeats 3] [--workers 2] [--scratch DIR]

Prints MB/s of text of the bare loop (without reading and starting) and of prepare_data (steady, and end to end with
starting), the ratios to the bare loop, the processor time of both, and the peak memory of the process tree. On a busy
machine only processor times can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
BATCH = 1 << 20
BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
batches, size = [[]], 0
for line in open(sys.argv[1], encoding="utf-8"):
    text = json.loads(line)["text"]
    batches[-1].append(text)
    size += len(text)
    if size > int(sys.argv[3]):
        batches.append([])
        size = 0
started, cpu = time.monotonic(), time.process_time()
for batch in batches:
    tokenizer.encode_batch_fast(batch, add_special_tokens=False)
print(time.monotonic() - started, time.process_time() - cpu)
"""


def peak_memory(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Write the largest sum of the resident memory of a process and its children into ``peak``."""
    while process.poll() is None:
        total = 0
        try:
            for member in (top := psutil.Process(process.pid), *top.children(recursive=True)):
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


@dataclass(frozen=True)
class Run:
    """Measurements and output of a process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str
    errors: str


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(arguments: list[str], workers: int) -> Run:
    """Run a new Python process; if it fails, this one exits with its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": str(workers)}
    started, cpu = time.monotonic(), cpu_seconds()
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = [0]
    watcher = threading.Thread(target=peak_memory, args=(process, peak))
    watcher.start()
    output, errors = process.communicate()
    seconds = time.monotonic() - started
    watcher.join()
    if process.returncode:
        sys.exit(output + errors)
    return Run(seconds, cpu_seconds() - cpu, peak[0], output, errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None)
    args = parser.parse_args()
    with open(args.corpus, encoding="utf-8") as lines:
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    rates: dict[str, list[float]] = {"bare": [], "steady": [], "end to end": []}
    processor: dict[str, list[float]] = {"bare": [], "prepare_data": []}
    memory: dict[str, int] = {"bare": 0, "prepare_data": 0}
    try:
        for _ in range(args.repeats):
            bare = ["-c", BARE, str(args.corpus), str(args.tokenizer), str(BATCH)]
            done = run(bare, args.workers)
            seconds, cpu = map(float, done.output.split())
            rates["bare"].append(megabytes / seconds)
            processor["bare"].append(cpu)
            memory["bare"] = max(memory["bare"], done.peak_bytes)
            done = run(
                [
                    str(ROOT / "pipelines" / "prepare_data.py"),
                    str(ROOT / "configs" / "pretrain" / "llm_s_moh75.yaml"),
                    f"tokenizer.path={args.tokenizer}",
                    f"data.inputs=[{args.corpus}]",
                    f"data.dir={scratch / 'dataset'}",
                    f"data.workers={args.workers}",
                    "data.validation_fraction=0.02",
                ],
                args.workers,
            )
            rates["end to end"].append(megabytes / done.seconds)
            rates["steady"].append(float(re.findall(r"([\d.]+) MB/s of text", done.errors)[-1]))
            processor["prepare_data"].append(done.cpu_seconds)
            memory["prepare_data"] = max(memory["prepare_data"], done.peak_bytes)
            shutil.rmtree(scratch / "dataset")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{megabytes:.1f} MB of text, {args.workers} workers")
    for name, values in rates.items():
        ratios = [value / bare for value, bare in zip(values, rates["bare"], strict=True)]
        print(
            f"{name:12} {statistics.median(values):6.2f} MB/s, {statistics.median(ratios):.2f} of the bare loop "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
        )
    print(
        ", ".join(f"{name}: {statistics.median(values):.1f} s of processor time" for name, values in processor.items())
    )
    print(", ".join(f"{name}: {peak / 1e6:.0f} MB at most" for name, peak in memory.items()))


if __name__ == "__main__":
    main()
