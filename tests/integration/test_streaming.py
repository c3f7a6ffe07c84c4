"""What a conversion holds in memory does not grow with the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.convert import SCRIPT

from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.load import config_from_mapping
from moh_megatron.io.safetensors_stream import SafetensorsWriter

pytestmark = pytest.mark.slow
MB = 1 << 20
HIDDEN, FFN, VOCABULARY, LAYERS = 1024, 8192, 64_000, 3
LARGEST = 2 * VOCABULARY * HIDDEN
MARGIN = 64 * MB


def write_llama(folder: Path, layers: int, vocabulary: int) -> int:
    """A LLaMA of bf16 ones; returns the bytes of its tensors."""
    folder.mkdir()
    sizes = {"num_layers": layers, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 16}
    config = config_from_mapping(
        {
            "run": {"dir": "unused"},
            "model": {**sizes, "vocab_size": vocabulary},
            "moh": {"enabled": False},
            "train": {"sequence_length": 64, "total_tokens": 64, "global_batch_size": 1, "precision": "bf16"},
            "optimizer": {"learning_rate": 1e-3},
        },
        "test",
    )
    shapes = {name: shape for rule in rules(config) for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)}
    described = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / "model.safetensors", described) as writer:
        for name, shape in shapes.items():
            writer.append(name, torch.ones(shape, dtype=torch.bfloat16))
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": 16,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return (folder / "model.safetensors").stat().st_size


TELLING = """
import atexit, runpy, sys
atexit.register(lambda: print(open("/proc/self/status").read()))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak(*arguments: object) -> int:
    """The largest resident memory of a conversion, bytes."""
    # It tells itself: what a parent learns of it begins with the parent's own memory.
    command = [sys.executable, "-c", TELLING, str(SCRIPT), *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", ended.stdout, re.MULTILINE)
    return int(kilobytes) * 1024


def test_memory_of_a_conversion_is_bounded_by_the_largest_tensor(tmp_path):
    write_llama(tmp_path / "small", 1, 64)
    size = write_llama(tmp_path / "large", LAYERS, VOCABULARY)
    assert size > LARGEST + 4 * MARGIN
    idle = peak("hf-to-megatron", "--hf-dir", tmp_path / "small", "--save-dir", tmp_path / "small_ckpt")
    busy = peak("hf-to-megatron", "--hf-dir", tmp_path / "large", "--save-dir", tmp_path / "ckpt")
    assert busy - idle < LARGEST + MARGIN
    cut = peak("hf-to-megatron", "--hf-dir", tmp_path / "large", "--save-dir", tmp_path / "cut", "parallel.tensor=8")
    assert cut - idle < LARGEST + MARGIN
    out = ("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back")
    assert peak(*out) - peak(*out[:3], "--hf-dir", tmp_path / "absent", "--dry-run") < LARGEST + MARGIN


def test_memory_of_converting_the_official_form_is_bounded(tmp_path):
    size = write_llama(tmp_path / "official", LAYERS, VOCABULARY)
    assert size > LARGEST + 4 * MARGIN
    write_llama(tmp_path / "small", 1, 64)
    idle = peak("official-to-hf", "--load-dir", tmp_path / "small", "--hf-dir", tmp_path / "small_hf")
    busy = peak("official-to-hf", "--load-dir", tmp_path / "official", "--hf-dir", tmp_path / "hf")
    assert busy - idle < LARGEST + MARGIN
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size >= size - MB
