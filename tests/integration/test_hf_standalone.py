"""An exported folder opens in an environment with only torch, transformers and their requirements."""

import ast
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM

from moh_megatron.checkpoint.hf import hf_export
from moh_megatron.checkpoint.hf.weight_readers import HeldWeights
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config, ModelConfig, MoHConfig, OptimizerConfig, RunConfig, TrainConfig
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer

TEXT = "a quick brown fox "
OPEN = """
import json, sys
sys.path.insert(0, sys.argv[1])
absent = []
for name in ("moh_megatron", "megatron", "deepspeed", "pydantic", "sentencepiece"):
    try:
        __import__(name)
    except ImportError:
        absent.append(name)
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
config = AutoConfig.from_pretrained(sys.argv[2], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
inputs = tokenizer(sys.argv[3], return_tensors="pt")
cached, uncached = (
    model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=use).tolist()
    for use in (True, False)
)
logits = model(inputs["input_ids"]).logits.tolist()
print()  # Loading the tokenizer without trust_remote_code leaves an unanswered question on this line.
print(json.dumps(dict(absent=absent, type=config.model_type, ids=inputs["input_ids"].tolist(), logits=logits,
                      cached=cached, uncached=uncached, text=tokenizer.decode(inputs["input_ids"][0]))))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("standalone")
    train_tokenizer([TEXT * 9], vocab_size=280, character_coverage=1.0, out_dir=root / "tokenizer")
    config = Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=8,
            num_query_groups=4,
            vocab_size=280,
        ),
        moh=MoHConfig(shared_heads=2, active_heads=4),
        train=TrainConfig(sequence_length=64, total_tokens=64, global_batch_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    generator = torch.Generator().manual_seed(2)
    state = {rule.megatron: 0.3 * torch.randn(rule.shape, generator=generator) for rule in rules(config)}
    with hf_export.atomic_export(root / "hf") as partial:
        hf_export.write_folder(
            partial, config, HeldWeights(state, config), root / "tokenizer", torch.float32, step=1, tokens=64
        )
    return root / "hf"


def requirements(*names: str) -> set[str]:
    """Return ``names`` and all distributions that they require."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        parsed = [Requirement(text) for text in needed]
        waiting += [
            requirement.name
            for requirement in parsed
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return found


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory) -> Path:
    """A folder of links to torch, transformers and their requirements, as the only packages of an interpreter."""
    site = tmp_path_factory.mktemp("site")
    for name in requirements("torch", "transformers"):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top).__fspath__())
    return site


def test_export_loads_and_generates_without_this_package(exported, bare_environment, tmp_path):
    environment = {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", OPEN, str(bare_environment), str(exported), TEXT],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["type"] == "moh_llama"
    assert {"moh_megatron", "megatron", "deepspeed"} <= set(got["absent"])
    assert got["text"] == TEXT
    assert len(got["cached"][0]) == len(got["ids"][0]) + 12
    assert got["cached"] == got["uncached"]

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    with torch.no_grad():
        expected = model(torch.tensor(got["ids"])).logits
    torch.testing.assert_close(torch.tensor(got["logits"]), expected, rtol=1e-5, atol=1e-6)


def test_exported_code_imports_only_torch_and_transformers(exported):
    files = sorted(exported.glob("*.py"))
    assert [file.name for file in files] == ["configuration_moh.py", "modeling_moh.py"]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
                assert node.level == 0 or node.module == "configuration_moh"
    assert imported <= {"torch", "transformers", "configuration_moh"}
