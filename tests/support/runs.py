"""Runs commands as a user types them, and reads the run folders."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
TIMEOUT_SECONDS = 240

STEPS = 30
SMALL: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 384,
    },
    "moh": {"shared_heads": 2, "active_heads": 4},
    "parallel": {"tensor": 2},
    "data": {"validation_fraction": 0.1, "ngram_baselines": True},
    "train": {
        "sequence_length": 32,
        "total_tokens": STEPS * 8 * 32,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "precision": "fp32",
        "eval_interval": 25,
        "eval_samples": 8,
    },
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
    "checkpoint": {"interval": 10},
    # The tests do not depend on the speed of this machine.
    "monitor": {
        "log_interval": 1,
        "image_interval": 10,
        "peak_tflops": 1.0,
        "alarm_mfu_drop": None,
        "alarm_slow_rank": None,
    },
    "generate": {"prompts": ["the"], "max_new_tokens": 8},
}


def command(script: str, *arguments: object) -> list[str]:
    """Return the command line of a pipeline script with arguments."""
    return [sys.executable, str(REPOSITORY / "pipelines" / script), *map(str, arguments)]


def finish(arguments: list[str], timeout: float = TIMEOUT_SECONDS, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its output as text; log records are in ``stderr``."""
    return subprocess.run(
        arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False, **options
    )


def prepare_small(folder: Path) -> tuple[Path, Path]:
    """Prepare sentences of a small artificial language below ``folder``; return (configuration, prepared dataset)."""
    draw = random.Random(0)
    syllables = ["ka", "lo", "mi", "ter", "an", "su", "ve", "ro", "pin", "da", "the", "or"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(200):
            text = " ".join(draw.choices(words, k=draw.randint(20, 80))) + "."
            stream.write(json.dumps({"text": text}) + "\n")
    config = folder / "small.yaml"
    values = {**SMALL, "run": {"dir": str(folder / "unused")}}
    values["data"] = {**SMALL["data"], "inputs": [str(folder / "text.jsonl")]}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = finish(command("prepare_data.py", config, f"data.dir={folder / 'data'}"))
    assert done.returncode == 0, done.stderr
    return config, folder / "data"


@dataclass(frozen=True)
class Run:
    """A run on the shared dataset, in a folder of its own."""

    config: Path
    data: Path
    folder: Path

    def arguments(self, *overrides: str, ranks: int = 2) -> list[str]:
        return command(
            "pretrain.py",
            self.config,
            "--nproc-per-node",
            ranks,
            f"run.dir={self.folder}",
            f"data.dir={self.data}",
            *overrides,
        )

    def finish(self, *overrides: str, ranks: int = 2, **options: Any) -> subprocess.CompletedProcess[str]:
        return finish(self.arguments(*overrides, ranks=ranks), **options)

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(*overrides), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def records(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            path = self.folder / "metrics.jsonl"
            if path.exists() and path.read_bytes().count(b"\n") >= step:
                return
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.kill()
        raise AssertionError(f"step {step} was not reached")


def ranks_of(launcher: int) -> list[int]:
    """Return the process ids of a launcher's ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    module = b"\0moh_megatron.commands.pretrain\0"
    return [int(child) for child in children if module in Path(f"/proc/{child}/cmdline").read_bytes()]


def gone(process: int) -> bool:
    """Return whether a process has ended; a zombie counts as ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a launcher and wait for its end; return exit code and output."""
    process.send_signal(number)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, output
