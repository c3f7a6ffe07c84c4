"""What a command says before it loads anything slow, and that Ctrl-C ends it at once while it does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moh_megatron.checkpoint.manifest import Manifest, Topology, write_manifest
from tests.support.early import HF_CONFIG
from tests.support.runs import REPOSITORY

# The first import of a slow library leaves a mark behind what was written before; then it interrupts the process, as
# Ctrl-C does.
COMMAND = """
import importlib, os, signal, sys

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "tensorboard"):
            sys.stderr.flush()
            os.write(2, b"<slow import>\\n")
            os.kill(os.getpid(), signal.SIGINT)
            os.write(2, b"<not interrupted>\\n")

sys.meta_path.insert(0, Slow())
signal.signal(signal.SIGINT, signal.default_int_handler)
name, *sys.argv = sys.argv[1:]
sys.exit(importlib.import_module(f"moh_megatron.commands.{name}").run())
"""
SMOKE = str(REPOSITORY / "configs" / "smoke.yaml")
COMMANDS = {
    "pretrain": (SMOKE, "--nproc-per-node", "2"),
    "continue_tune": (SMOKE, "--prepare", "train.init_from=run"),
    "generate": (SMOKE, "generate.load=model"),
    "generate of a folder": ("model",),
    "evaluate": ("run",),
    "report": ("model",),
    "convert to hf": ("megatron-to-hf", "--load-dir", "run", "--hf-dir", "hf"),
    "convert from hf": ("hf-to-megatron", "--hf-dir", "model", "--save-dir", "checkpoint"),
    "convert the official form": ("official-to-hf", "--load-dir", "model", "--hf-dir", "hf"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_loads_first_and_ctrl_c_ends_it_at_once(command: str, tmp_path: Path) -> None:
    # What can be refused without slow imports is in order.
    checkpoint = tmp_path / "run" / "step_00000001"
    (checkpoint / "weights").mkdir(parents=True)
    write_manifest(checkpoint, Manifest(1, 1, Topology(1, 1, 1, "fp32"), "", {}, {}))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    name = command.split()[0]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, name, f"moh-{name}", *COMMANDS[command]],
        env=environment | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    words, mark, rest = done.stderr.partition("<slow import>\n")
    assert mark, done.stderr
    expected = {"pretrain": "starting 2 processes: loading PyTorch\n", "report": "loading TensorBoard\n"}
    assert words == expected.get(name, "loading PyTorch\n")
    assert (rest, done.stdout) == ("", "")
    assert done.returncode == -signal.SIGINT
