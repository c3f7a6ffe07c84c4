"""Runs lm-eval's tasks on a model of ``lm_eval_models``."""

from __future__ import annotations

import difflib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from moh_megatron.evaluate.suite import Suite, Task
from moh_megatron.io.console import is_quiet
from moh_megatron.io.errors import UserError

_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}
"""The length by which a metric divides a choice's log-likelihood; other metrics do not divide it."""
_MODULES_WITH_BARS: tuple[Any, ...] = (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)


@dataclass(frozen=True)
class Question:
    """One question, the model's answer and its score."""

    task: str
    """The task; of a group, the member."""
    id: int
    hash: str
    """lm-eval's hash of the question."""
    answer: str
    """The number of the choice that the model took, or the text that it wrote."""
    score: float
    """The score by the suite's metric."""


@dataclass(frozen=True)
class Score:
    """The model's score on one task."""

    task: str
    shots: int
    metric: str
    value: float
    standard_error: float | None
    questions: int


def find_tasks(suite: Suite) -> TaskManager:
    """lm-eval's TaskManager, checked to know every task of ``suite``.

    Raises UserError for an unknown task, for a metric that a task's settings do not name, and for data that are not
    installed.
    """
    manager = TaskManager()
    known = set(manager.all_tasks)
    for task in suite.tasks:
        if task.task not in known:
            near = difflib.get_close_matches(task.task, sorted(known), n=5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"{suite.name}: {task.task}: lm-eval {version('lm-eval')} knows no such task{hint}.")
        suite.data_folder(task)
        columns = _columns({**(manager.task_index[task.task].cfg or {}), **task.settings})
        if columns and task.column not in columns:
            raise UserError(f"{suite.name}: {_no_metric(task, columns)}")
    return manager


def _columns(settings: Mapping[str, Any]) -> list[str]:
    """The metrics, each with its filter, that a task or group with these settings reports; empty where unknown."""
    aggregated = settings.get("aggregate_metric_list")
    if aggregated:
        aggregated = [aggregated] if isinstance(aggregated, dict) else aggregated
        requested = [(metric["metric"], metric.get("filter_list", "none")) for metric in aggregated]
        filters = [(metric, [names] if isinstance(names, str) else names) for metric, names in requested]
        return [f"{metric},{name}" for metric, names in filters for name in names]
    metrics = settings.get("metric_list") or []
    if "process_results" in settings or any(metric.get("hf_evaluate") for metric in metrics):
        return []  # such metrics may report more than their settings name
    names = [filter_["name"] for filter_ in settings.get("filter_list") or [{"name": "none"}]]
    return [f"{str(metric['metric']).rpartition('.')[2]},{name}" for metric in metrics for name in names]


def _no_metric(task: Task, columns: Sequence[str]) -> str:
    return f"{task.task}: has no metric {task.metric}. It has {', '.join(columns)}."


def run_task(
    model: LM, suite: Suite, task: Task, limit: int | None, manager: TaskManager
) -> tuple[Score, list[Question]]:
    """Run one task on its first ``limit`` questions, those of each member of a group; on all where None.

    Raises UserError where its data cannot be reached or it has no such metric.
    """
    tasks = _load_task(suite, task, manager)
    groups, members = tasks["groups"], tasks["tasks"]
    evaluate: Any = lm_eval.simple_evaluate
    with _bars_unless_quiet():
        results = evaluate(
            model=model,
            tasks=[groups[task.task]] if task.task in groups else [*members.values()],
            num_fewshot=task.shots,
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
            log_samples=True,
        )
    task_results = (results.get("groups") or {}).get(task.task) or results["results"][task.task]
    if task.column not in task_results:
        raise UserError(_no_metric(task, _metrics(task_results)))
    questions = list(_questions(results["samples"], task, members))
    return _score(task, task_results[task.column], questions), questions


@contextmanager
def _bars_unless_quiet() -> Iterator[None]:
    """Hide lm-eval's own progress bars under --quiet; it has no option for them."""
    if not is_quiet():
        yield
        return

    def hidden_bar(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **{**options, "disable": True})

    for module in _MODULES_WITH_BARS:
        module.tqdm = hidden_bar
    try:
        yield
    finally:
        for module in _MODULES_WITH_BARS:
            module.tqdm = tqdm


def _load_task(suite: Suite, task: Task, manager: TaskManager) -> Any:
    """The task with its data, or the members of a group with theirs."""
    try:
        with task_specification(suite, task, manager) as specification:
            return manager.load([specification])
    except UserError:
        raise
    except Exception as error:  # The libraries for data raise any kind of error; the other tasks shall still run.
        hint = ""
        if "scripts are no longer supported" in str(error):
            hint = " Name a copy without one as settings: {dataset_path: COPY} in the suite."
        raise UserError(
            f"{task.task}: its evaluation set cannot be reached or read: {_first_line(error)}{hint}"
        ) from error


@contextmanager
def task_specification(suite: Suite, task: Task, manager: TaskManager) -> Iterator[str]:
    """What lm-eval loads: the name of its task, or a file that includes that task and overrides its settings."""
    folder = suite.data_folder(task)
    settings = {**task.settings, **(_data_settings(folder) if folder is not None else {})}
    if not settings:
        yield task.task
        return
    base = manager.task_index[task.task].yaml_path
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / f"{task.task}.yaml"
        file.write_text(json.dumps({"include": str(base), "task": task.task, **settings}), encoding="utf-8")
        yield str(file)


def _metrics(results: dict[str, Any]) -> list[str]:
    return sorted(name for name, value in results.items() if "," in name and "stderr" not in name and value is not None)


def _score(task: Task, value: float, questions: Sequence[Question]) -> Score:
    scores = [question.score for question in questions]
    error = None
    if len(scores) > 1:
        mean = math.fsum(scores) / len(scores)
        error = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1) / len(scores))
    return Score(task.task, task.shots, task.metric, float(value), error, len(scores))


def _data_settings(folder: Path) -> dict[str, Any]:
    """Settings with which lm-eval reads the splits in ``folder``."""
    splits = {path.name: sorted(map(str, path.glob("*.arrow"))) for path in sorted(folder.iterdir()) if path.is_dir()}
    absent = {f"{name}_split": None for name in ("training", "validation", "test", "fewshot")}
    names = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    present = {names[split]: split for split in splits if split in names}
    return {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": splits},
        **absent,
        **present,
    }


def _questions(
    samples: Mapping[str, list[dict[str, Any]]], task: Task, members: Mapping[str, Any]
) -> Iterator[Question]:
    metric, _, chosen_filter = task.column.partition(",")
    length = _LENGTHS.get(metric, lambda choice: 1)
    for member, questions in samples.items():
        for sample in questions:
            if sample.get("filter", "none") == chosen_filter and metric in sample:
                yield Question(
                    member,
                    sample["doc_id"],
                    sample["doc_hash"],
                    _answer(sample, members[member], length),
                    float(sample[metric]),
                )


def _answer(sample: Mapping[str, Any], task: Any, length: Callable[[str], int]) -> str:
    """The number of the choice with the greatest log-likelihood over its length, or the generated text."""
    responses: list[Any] = sample["filtered_resps"]
    if not all(isinstance(response, list | tuple) and len(response) == 2 for response in responses):
        return str(responses[0])
    if len(responses) == 1:
        return str(responses[0][1])
    lengths = map(length, task.doc_to_choice(sample["doc"]))
    scores = [float(likelihood) / divisor for (likelihood, _), divisor in zip(responses, lengths, strict=True)]
    return str(scores.index(max(scores)))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
