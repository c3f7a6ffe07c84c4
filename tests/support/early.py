"""Runs commands in a process that cannot import torch and what else is slow, one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""The config.json of a small LLaMA."""
_RUNNER = """
import contextlib, io, json, sys
for name in ("torch", "megatron", "deepspeed", "transformers", "lm_eval", "datasets"):
    sys.modules[name] = None  # Importing it raises ModuleNotFoundError.
import importlib.util
from importlib.machinery import ModuleSpec
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: ModuleSpec(name, None) if name in ("lm_eval", "accelerate") else found(name)
results = []
for sys.argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = importlib.import_module(f"moh_megatron.commands.{sys.argv[0]}").run()
        except SystemExit as ended:
            code = ended.code
    results.append([code, errors.getvalue()])
print(json.dumps(results))
"""


def run_without_slow_imports(commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, str]]:
    """Run ``commands``, each the name of a module and its arguments, in ``folder``; return exit codes and errors."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", _RUNNER, json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(code, errors) for code, errors in json.loads(done.stdout)]
