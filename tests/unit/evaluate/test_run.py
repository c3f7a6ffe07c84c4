"""What an evaluation writes, and when; how lm-eval is asked and answered."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moh_megatron.config.errors import Fault, UserError
from moh_megatron.evaluate import harness, run, validation
from moh_megatron.evaluate.suite import Suite, Task
from moh_megatron.evaluate.validation import SourceLoss

SUITE = Suite("s", "d", (Task("a", 0, "acc"), Task("b", 0, "acc")))


def question(task: str, score: float) -> dict[str, Any]:
    return {"of": task, "task": task, "id": 0, "hash": "h", "answer": "1", "score": score}


def scored(task: str) -> dict[str, Any]:
    return {"task": task, "shots": 0, "metric": "acc", "value": 1.0, "standard_error": None, "questions": 1}


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """evaluate(tasks, against=...) with everything but the writing replaced."""
    subject = SimpleNamespace(described=lambda: {"path": "m", "kind": "folder", "step": None, "tokens": None})

    def evaluate(tasks: Any, other: Any = None) -> None:
        monkeypatch.setattr(run, "find_model", lambda path: path)
        monkeypatch.setattr(run, "open_subject", lambda *unused: subject)
        monkeypatch.setattr(run, "checked_suite", lambda path: (SUITE, None))
        monkeypatch.setattr(run, "read_questions", lambda path: other)
        monkeypatch.setattr(run, "_tasks", lambda *unused: tasks)
        against = None if other is None else Path("other")
        arguments = {"model": tmp_path, "overrides": [], "config": None, "no_validation": True, "suite": Path("s")}
        arguments |= {"limit": None, "batch_size": 1, "against": against, "out": tmp_path, "device": "cpu"}
        run.evaluate(Namespace(**arguments, dtype="fp32"))

    return evaluate


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_every_task_is_written_before_the_next(evaluated: Any, tmp_path: Path) -> None:
    def tasks() -> Any:
        yield scored("a"), [question("a", 1.0)]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated(tasks())
    done, waiting = results(tmp_path)["suite"]["tasks"]
    assert (done["value"], waiting["not_run"]) == (1.0, "its turn has not come")
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 1


def test_nothing_to_compare_loses_nothing_that_was_measured(evaluated: Any, tmp_path: Path) -> None:
    tasks = [(scored("a"), [question("a", 1.0)]), (scored("b"), [])]
    with pytest.raises(Fault, match="share no question"):
        evaluated(tasks, {("c", "c", 0, "h"): 1.0})
    assert [each["value"] for each in results(tmp_path)["suite"]["tasks"]] == [1.0, 1.0]
    assert "comparison" not in results(tmp_path)
    evaluated(tasks, {("a", "a", 0, "h"): 0.0})
    (compared,) = results(tmp_path)["comparison"]["tasks"]
    assert (compared["task"], compared["better"], compared["p_value"]) == ("a", 1, None)


def test_a_task_that_was_not_run_is_a_fault_at_the_end(evaluated: Any, tmp_path: Path) -> None:
    missing = run._not_run(SUITE.tasks[1], "b: its evaluation set cannot be reached")
    with pytest.raises(Fault, match="not run: b: its evaluation set cannot be reached"):
        evaluated([(scored("a"), []), (missing, [])])
    assert [each.get("value") for each in results(tmp_path)["suite"]["tasks"]] == [1.0, None]


@pytest.mark.parametrize(("step", "expected"), [(5, 1.0), (None, 2.5)])
def test_sources_count_by_their_shares_at_the_model_s_step(
    tiny: Any, monkeypatch: Any, step: Any, expected: Any
) -> None:
    """50 / 25 / 25 of a, b, c, later 25 / 75 / 0; b holds nothing out at first, c never."""
    sources = [{"name": name, "inputs": ["x"], "weight": weight} for name, weight in (("a", 2), ("b", 1), ("c", 1))]
    changes = [{"step": 10, "weights": {"a": 1, "b": 3, "c": 0}}]
    config = tiny({"data.sources": sources, "data.weight_changes": changes, "tokenizer.path": "t"})
    tokenizer = SimpleNamespace(sha256="x", eod=0)
    losses = {"a": 1.0, "b": 3.0}
    monkeypatch.setattr(validation, "be_alone", lambda seed: None)
    monkeypatch.setattr(validation, "load_prepared", lambda config: SimpleNamespace(tokenizer=lambda: tokenizer))
    monkeypatch.setattr(validation, "load_tokenizer", lambda folder: tokenizer)
    held_out = losses if step is None else {"a": 1.0}
    monkeypatch.setattr(validation, "build_validation_datasets", lambda *unused: held_out)
    monkeypatch.setattr(validation, "_of_source", lambda subject, loss, *unused: SourceLoss(loss, None, 1.0, 1, 16))
    subject: Any = SimpleNamespace(step=step, tokenizer_dir=Path("t"))
    found = validation.validation_loss(subject, config)
    assert found["loss"] == pytest.approx(expected)
    monkeypatch.setattr(validation, "build_validation_datasets", lambda *unused: {})
    assert validation.validation_loss(subject, config) == {"loss": None, "sources": {}}


class Manager:
    """lm-eval's, with two tasks it knows and what happens when one is opened."""

    def __init__(self, load: Any = None) -> None:
        self.all_tasks = ["arc_easy", "arc_challenge"]
        self.load = load


def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TaskManager", Manager)
    with pytest.raises(UserError, match=r"s: arc_eazy: lm-eval [\d.]+ knows no such task; near it: arc_easy"):
        harness.find_tasks(Suite("s", "d", (Task("arc_eazy", 0, "acc"),)))
    assert isinstance(harness.find_tasks(Suite("s", "d", (Task("arc_easy", 0, "acc"),))), Manager)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("no route\nto host"), "a: its evaluation set cannot be reached or read: no route$"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found a.py"),
            r"Name a copy without one as settings",
        ),
        (UserError("a: its data are in the package x"), "^a: its data are in the package x$"),
    ],
)
def test_data_that_cannot_be_reached(error: Exception, expected: str) -> None:
    def load(specification: Any) -> None:
        raise error

    manager: Any = Manager(load)
    with pytest.raises(UserError, match=expected):
        harness.run_task(None, SUITE, SUITE.tasks[0], None, manager)  # pyright: ignore[reportArgumentType]


def test_the_answer_is_chosen_as_the_metric_scores() -> None:
    choices = ["yes", "certainly not"]
    task = SimpleNamespace(doc_to_choice=lambda doc: choices)
    sample = {"doc": {}, "filtered_resps": [(-3.0, False), (-6.0, False)], "doc_id": 0, "doc_hash": "h"}
    sample |= {"filter": "none", "acc": 1.0, "acc_norm": 0.0}
    for metric, answer in (("acc", "0"), ("acc_norm", "1")):
        (found,) = harness._questions({"a": [sample]}, Task("a", 0, metric), {"a": task})
        assert found.answer == answer
    written = {**sample, "filtered_resps": ["42"]}
    (found,) = harness._questions({"a": [written]}, Task("a", 0, "acc"), {"a": task})
    assert found.answer == "42"


class Letters:
    """A tokenizer: a letter a token, with BOS before everything unless it is told otherwise."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return begin + [ord(letter) - ord("a") for letter in text]

    def decode(self, tokens: Any, **unused: Any) -> str:
        return "".join(chr(ord("a") + token) for token in ([tokens] if isinstance(tokens, int) else tokens))


def checkpoint_lm(monkeypatch: pytest.MonkeyPatch, bos: int | None, context: int = 8) -> Any:
    monkeypatch.setattr(harness, "open_tokenizer", lambda folder: Letters(bos))
    monkeypatch.setattr(harness, "load_tokenizer", lambda folder: SimpleNamespace(eod=25))
    table = torch.randn(26, 26, generator=torch.Generator().manual_seed(0))
    subject: Any = SimpleNamespace(
        tokenizer_dir=Path("t"),
        context=context,
        model=None,
        device=torch.device("cpu"),
        logits=lambda tokens: table[tokens],
    )
    return harness.CheckpointLM(subject, 2), table.log_softmax(-1)


@pytest.mark.parametrize(("bos", "prefix"), [(None, 25), (24, 24)])
def test_a_checkpoint_s_likelihoods(monkeypatch: pytest.MonkeyPatch, bos: int | None, prefix: int) -> None:
    model, table = checkpoint_lm(monkeypatch, bos)
    assert (model.prefix_token_id, model.eot_token_id) == (prefix, 25)
    requests = [SimpleNamespace(args=args) for args in (("ab", "c"), ("", "de"), ("a" * 20, "fg"))]
    first, second, third = model.loglikelihood(requests, disable_tqdm=True)
    assert first[0] == pytest.approx(float(table[1, 2]), rel=1e-6)
    assert second[0] == pytest.approx(float(table[prefix, 3] + table[3, 4]), rel=1e-6)
    assert third[0] == pytest.approx(float(table[0, 5] + table[5, 6]), rel=1e-6)
    assert first[1] == (int(table[1].argmax()) == 2)
    (whole,) = model.loglikelihood_rolling([SimpleNamespace(args=("abc",))], disable_tqdm=True)
    begun = [prefix, *model.tok_encode("abc")]
    assert whole == pytest.approx(sum(float(table[a, b]) for a, b in pairwise(begun)), rel=1e-6)


def test_a_text_that_begins_with_bos_gets_no_second(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = checkpoint_lm(monkeypatch, 24)
    assert model.tok_encode("ab") == [24, 0, 1]
    assert model.tok_encode("yab") == [24, 0, 1]
    assert model.tok_encode("ab", add_special_tokens=False) == [0, 1]


@pytest.mark.parametrize(("context", "prompt", "longest"), [(8, 4, 4), (300, 20, 256), (260, 4, 256), (1, 1, 1)])
def test_a_question_and_its_answer_fit_into_the_context(
    monkeypatch: pytest.MonkeyPatch, context: int, prompt: int, longest: int
) -> None:
    model, _ = checkpoint_lm(monkeypatch, None, context)
    asked: list[tuple[int, int]] = []

    def continue_text(model: Any, tokens: list[int], max_new_tokens: int, **unused: Any) -> list[int]:
        asked.append((len(tokens), max_new_tokens))
        return [1] * max_new_tokens

    monkeypatch.setattr(harness, "continue_text", continue_text)
    assert model._generate("a" * 20, {}) == "b" * longest
    assert asked[0][0] == prompt
    with pytest.raises(UserError, match="generates greedily only"):
        model._generate("a", {"do_sample": True, "temperature": 0.7})
