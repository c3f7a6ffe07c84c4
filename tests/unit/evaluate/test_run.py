"""When an evaluation writes which results, and what it refuses to replace."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moh_megatron.evaluate import harness, held_out_loss, lm_eval_models, paired_test, run
from moh_megatron.evaluate.harness import Question, Score
from moh_megatron.evaluate.held_out_loss import SourceLoss
from moh_megatron.evaluate.suite import Suite, Task
from moh_megatron.io.errors import Fault, UserError

SUITE = Suite("s", "d", (Task("a", 0, "acc"), Task("b", 0, "acc")))


def question(task: str, score: float) -> Question:
    return Question(task, 0, "h", "1", score)


def scored(task: str, value: float = 1.0) -> Score:
    return Score(task, 0, "acc", value, None, 1)


B_CANNOT_RUN = UserError("b: its evaluation set cannot be reached")


def next_outcome(outcomes: Iterator[Any]) -> Any:
    outcome = next(outcomes)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


@pytest.fixture
def evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """evaluate(outcomes of the tasks, scores to compare with, ...), where nothing is loaded or measured."""

    def evaluate(
        outcomes: Any, other: Any = None, step: int | None = None, out: Path = tmp_path, **changed: Any
    ) -> None:
        remaining = iter(outcomes)
        loaded = SimpleNamespace(described=lambda: {"path": "m", "kind": "folder", "step": step, "tokens": None})
        monkeypatch.setattr(run, "find_model", lambda path: path)
        monkeypatch.setattr(run, "load_model", lambda *unused: loaded)
        monkeypatch.setattr(run, "checked_suite", lambda path: (replace(SUITE, name=str(path)), None))
        monkeypatch.setattr(run, "read_questions", lambda path: other)
        monkeypatch.setattr(lm_eval_models, "language_model", lambda *unused: None)
        monkeypatch.setattr(harness, "run_task", lambda *unused: next_outcome(remaining))
        monkeypatch.setattr(run, "training_config", lambda path, overrides: overrides)
        monkeypatch.setattr(run, "validation_loss", lambda *unused: {"loss": None, "sources": {}})
        against = None if other is None else Path("other")
        arguments = {"model": tmp_path, "overrides": [], "config": None, "no_validation": True, "suite": Path("s")}
        monkeypatch.setattr(run, "check_validation_data", lambda *unused: None)
        arguments |= {"limit": None, "batch_size": 1, "against": against, "out": out, "device": "cpu"}
        arguments |= {"trust_remote_code": False}
        run.evaluate(Namespace(**{**arguments, "dtype": "fp32", **changed}))

    return evaluate


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_the_result_of_a_task_is_written_before_the_next_task_runs(evaluated: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluated([(scored("a"), [question("a", 1.0)]), RuntimeError("out of memory")])
    done, waiting = results(tmp_path)["suite"]["tasks"]
    assert (done["value"], waiting["not_run"]) == (1.0, "not run yet")
    assert len((tmp_path / "questions.jsonl").read_text().splitlines()) == 1


def test_measured_scores_are_kept_where_the_comparison_fails(evaluated: Any, tmp_path: Path) -> None:
    tasks = [(scored("a"), [question("a", 1.0)]), (scored("b"), [])]
    with pytest.raises(Fault, match="share no question"):
        evaluated(tasks, {("c", "c", 0, "h"): 1.0})
    assert [task["value"] for task in results(tmp_path)["suite"]["tasks"]] == [1.0, 1.0]
    assert "comparison" not in results(tmp_path)
    evaluated(tasks, {("a", "a", 0, "h"): 0.0})
    (compared,) = results(tmp_path)["comparison"]["tasks"]
    assert (compared["task"], compared["better"], compared["p_value"]) == ("a", 1, None)


def test_a_task_that_cannot_run_is_a_fault_at_the_end(evaluated: Any, tmp_path: Path) -> None:
    with pytest.raises(Fault, match="not run: b: its evaluation set cannot be reached"):
        evaluated([(scored("a"), []), B_CANNOT_RUN])
    assert [task.get("value") for task in results(tmp_path)["suite"]["tasks"]] == [1.0, None]


def both(first: float = 1.0) -> Any:
    return [(scored("a", first), [question("a", first)]), (scored("b"), [question("b", 0.0)])]


def test_validation_and_suite_of_one_model_are_kept_side_by_side(evaluated: Any, tmp_path: Path) -> None:
    evaluated(both())
    evaluated([], suite=None, no_validation=False)
    evaluated([], suite=None, no_validation=False)
    found = results(tmp_path)
    assert found["validation"]["of"] == {"config": None, "overrides": []}
    assert [task["value"] for task in found["suite"]["tasks"]] == [1.0, 1.0]
    assert len(paired_test.read_questions(tmp_path)) == 2
    assert "| a | 0 | acc | 1 | 100.0 | measured here |" in (tmp_path / "results.md").read_text()


def test_a_repeated_suite_keeps_earlier_scores_of_tasks_that_cannot_run(evaluated: Any, tmp_path: Path) -> None:
    evaluated(both())
    with pytest.raises(Fault, match="cannot be reached"):
        evaluated([both(0.5)[0], B_CANNOT_RUN])
    assert [task["value"] for task in results(tmp_path)["suite"]["tasks"]] == [0.5, 1.0]
    assert paired_test.read_questions(tmp_path) == {("a", "a", 0, "h"): 0.5, ("b", "b", 0, "h"): 0.0}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"suite": Path("t")}, "suite.name is s. Here it is t: name another folder with --out, or remove that one"),
        ({"limit": 5}, "suite.limit is None. Here it is 5"),
        ({"suite": None, "no_validation": False, "overrides": ["x"]}, r"validation.overrides is \[\]. Here it is \['x"),
        ({"step": 7}, "model.step is None. Here it is 7"),
        ({"dtype": "bf16"}, "dtype is fp32. Here it is bf16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_evaluation_under_other_conditions_does_not_replace_results(
    evaluated: Any, tmp_path: Path, other: dict[str, Any], expected: str
) -> None:
    evaluated(both(), no_validation=False)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"{tmp_path}: holds an evaluation whose {expected}"):
        evaluated([], **other)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match=r"results\.json: must be the results of an evaluation"):
        evaluated([], **other)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_unwritable_folder_is_refused_before_anything_is_measured(evaluated: Any, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()

    def outcomes() -> Any:
        pytest.fail("a task was run")
        yield

    with pytest.raises(UserError, match=f"{out}: must be a folder to write to.*name another with --out"):
        evaluated(outcomes(), out=tmp_path / out)


@pytest.mark.parametrize(("step", "expected"), [(5, 1.0), (None, 2.5)])
def test_validation_loss_weights_sources_by_their_shares_at_the_models_step(
    tiny: Any, monkeypatch: Any, step: Any, expected: Any
) -> None:
    """50 / 25 / 25 of a, b, c, later 25 / 75 / 0; b holds nothing out at first, c never."""
    sources = [{"name": name, "inputs": ["x"], "weight": weight} for name, weight in (("a", 2), ("b", 1), ("c", 1))]
    changes = [{"step": 10, "weights": {"a": 1, "b": 3, "c": 0}}]
    config = tiny({"data.sources": sources, "data.weight_changes": changes, "tokenizer.path": "t"})
    tokenizer = SimpleNamespace(sha256="x", eos_token_id=0)
    losses = {"a": 1.0, "b": 3.0}
    monkeypatch.setattr(held_out_loss, "init_single_process", lambda seed: None)
    monkeypatch.setattr(held_out_loss, "load_prepared", lambda config: SimpleNamespace(tokenizer=lambda: tokenizer))
    monkeypatch.setattr(held_out_loss, "load_tokenizer", lambda folder: tokenizer)
    held_out = losses if step is None else {"a": 1.0}
    monkeypatch.setattr(held_out_loss, "build_validation_datasets", lambda *unused: held_out)
    monkeypatch.setattr(held_out_loss, "_source_loss", lambda loaded, loss, *unused: SourceLoss(loss, None, 1.0, 1, 16))
    loaded: Any = SimpleNamespace(step=step, tokenizer_dir=Path("t"))
    found = held_out_loss.validation_loss(loaded, config)
    assert found["loss"] == pytest.approx(expected)
    monkeypatch.setattr(held_out_loss, "build_validation_datasets", lambda *unused: {})
    assert held_out_loss.validation_loss(loaded, config) == {"loss": None, "sources": {}}
