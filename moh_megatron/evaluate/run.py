"""One evaluation from start to end: load, measure, write results.json, questions.jsonl and results.md."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.earlier import read_earlier
from moh_megatron.evaluate.held_out_loss import validation_loss
from moh_megatron.evaluate.loaded_model import LoadedModel, find_model, load_model, training_config
from moh_megatron.evaluate.paired_test import compare, key_of, read_questions
from moh_megatron.evaluate.results import RESULTS, write_results
from moh_megatron.evaluate.suite import Suite, Task, load_suite
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.remedies import check_folder


def evaluate(arguments: Namespace) -> None:
    """What ``pipelines/evaluate.py`` does with its arguments.

    What is measured is written at once, task by task, beside what the folder holds of the same model. Raises
    UserError, before anything is measured; Fault at the end, where a task could not be run or nothing is left to
    compare.
    """
    path = find_model(arguments.model)
    config = _training_config(arguments, path)
    _check(arguments)
    checked = checked_suite(arguments.suite) if arguments.suite is not None else None
    other = read_questions(arguments.against) if arguments.against is not None else None
    folder = arguments.out or default_folder(path)
    check_folder(folder)
    subject = load_model(path, _device(arguments.device), arguments.dtype)
    found: dict[str, Any] = {"model": subject.described(), "dtype": arguments.dtype, "software": _software()}
    given = {"config": arguments.config and str(arguments.config), "overrides": arguments.overrides}
    planned = {
        **found,
        **({"validation": {"of": given}} if config is not None else {}),
        **({"suite": _section(checked[0], arguments.limit)} if checked is not None else {}),
        **({"comparison": {"against": str(arguments.against)}} if other is not None else {}),
    }
    earlier, questions = read_earlier(folder, planned)
    found = {**earlier, **found}
    if config is not None:
        found["validation"] = {**validation_loss(subject, config), "of": given}
        write_results(folder, found, questions)
    complaints: list[str] = []
    if checked is not None:
        section: dict[str, Any] = planned["suite"]
        section["tasks"] = earlier.get("suite", section)["tasks"]
        found["suite"] = section
        past, questions = questions, []
        for number, (task, answered) in enumerate(_tasks(subject, *checked, arguments.limit, arguments.batch_size)):
            if "not_run" in task:
                complaints.append(f"not run: {task['not_run']}")
            if "not_run" not in task or "not_run" in section["tasks"][number]:
                section["tasks"][number] = task
                past = [each for each in past if each["of"] != task["task"]]
            questions += answered
            write_results(folder, found, questions + past)
        questions += past
    if other is not None:
        own = {key_of(each): each["score"] for each in questions}
        try:
            comparisons = [asdict(each) for each in compare(own, other)]
            found["comparison"] = {"against": str(arguments.against), "tasks": comparisons}
        except UserError as error:
            complaints.append(str(error))
    print(write_results(folder, found, questions))
    print(f"results: {folder / RESULTS}")
    if complaints:
        raise Fault("\n".join(complaints))


def default_folder(path: Path) -> Path:
    """Where results go that nobody gave a place: ``eval/NAME`` beside the model, or beside its checkpoints."""
    parent = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return parent / "eval" / path.name


def _training_config(arguments: Namespace, path: Path) -> Config | None:
    given: Path | None = arguments.config
    if not arguments.no_validation:
        return load_config(given, arguments.overrides) if given else training_config(path, arguments.overrides)
    if arguments.overrides or given:
        raise UserError("--no-validation leaves nothing for a configuration to say. Got one, or overrides; drop them.")
    if arguments.suite is None:
        raise UserError("--no-validation without --suite leaves nothing to measure. Drop the one or name the other.")
    return None


def _check(arguments: Namespace) -> None:
    if arguments.suite is None and arguments.against is not None:
        raise UserError("--against compares answers to tasks, and needs --suite.")
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")


def checked_suite(path: Path) -> tuple[Suite, Any]:
    """The suite, and lm-eval's manager of tasks, which knows all of them. Raises UserError where it does not."""
    suite = load_suite(path)
    try:
        from moh_megatron.evaluate.harness import find_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"--suite needs {error.name}. Run: pip install '.[eval]'") from None
    return suite, find_tasks(suite)


def _section(suite: Suite, limit: int | None) -> dict[str, Any]:
    """``suite`` of results.json, before any task."""
    return {
        "name": suite.name,
        "description": suite.description,
        "limit": limit,
        "tasks": [_not_run(task, "its turn has not come") for task in suite.tasks],
        "published": [asdict(each) for each in suite.published],
    }


def _not_run(task: Task, why: str) -> dict[str, Any]:
    return {"task": task.task, "shots": task.shots, "metric": task.metric, "not_run": why}


def _tasks(
    subject: LoadedModel, suite: Suite, manager: Any, limit: int | None, batch_size: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of each task what stands in results.json, and its questions."""
    from moh_megatron.evaluate.harness import language_model, run_task

    model = language_model(subject, batch_size)
    for task in suite.tasks:
        try:
            score, answered = run_task(model, suite, task, limit, manager)
        except UserError as error:
            yield _not_run(task, str(error)), []
        else:
            yield asdict(score), [{"of": task.task, **asdict(each)} for each in answered]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device must be cpu, cuda or auto, and be there. Got {name!r}: {error}") from None
    return device


def _software() -> dict[str, str]:
    versions = {}
    for name in ("torch", "transformers", "lm-eval"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
