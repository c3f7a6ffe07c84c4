"""Makes Hugging Face folders of small random LLaMAs, and runs the conversion script in this process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parents[2] / "pipelines" / "convert.py"
LLAMA3: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}


def llama_folder(folder: Path, *, transformers_4: bool = False, dtype: str = "float32", **settings: Any) -> Path:
    """Write a random LlamaForCausalLM to ``folder``; ``transformers_4`` writes config.json as that version did."""
    values: dict[str, Any] = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    } | settings
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**values)).to(getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    if transformers_4:
        file = folder / "config.json"
        content = json.loads(file.read_text())
        rope = content.pop("rope_parameters")
        content["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        content["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
        content["torch_dtype"] = content.pop("dtype")
        file.write_text(json.dumps(content))
    return folder


# Nothing distinguishes a folder of the official form from a dense LLaMA, so both commands can read the same folder.
into_either_form = pytest.mark.parametrize(
    ("command", "source", "target"),
    [("hf-to-megatron", "--hf-dir", "--save-dir"), ("official-to-hf", "--load-dir", "--hf-dir")],
)


def run_convert(*arguments: object) -> int:
    """Run the script with ``arguments``; returns its exit code."""
    with patch.object(sys, "argv", [str(SCRIPT), *map(str, arguments)]), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code
