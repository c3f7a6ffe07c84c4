"""One evaluation from start to end: load, measure, write results.json, questions.jsonl and results.md."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from moh_megatron.config.errors import Fault, UserError
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.compare import compare, key_of, read_questions
from moh_megatron.evaluate.results import RESULTS, write_results
from moh_megatron.evaluate.subject import Subject, find_model, open_subject, training_config
from moh_megatron.evaluate.suite import Suite, load_suite
from moh_megatron.evaluate.validation import validation_loss


def evaluate(arguments: Namespace) -> None:
    """What ``pipelines/evaluate.py`` does with its arguments.

    Raises UserError, before anything is measured; Fault at the end, where a task could not be run.
    """
    path = find_model(arguments.model)
    config = _training_config(arguments, path)
    suite = _checked_suite(arguments)
    other = read_questions(arguments.against) if arguments.against is not None else None
    subject = open_subject(path, _device(arguments.device), arguments.dtype)
    found: dict[str, Any] = {"model": subject.described(), "dtype": arguments.dtype, "software": _software()}
    if config is not None:
        found["validation"] = validation_loss(subject, config)
    questions: list[dict[str, Any]] = []
    if suite is not None:
        found["suite"], questions = _run_suite(subject, suite, arguments.limit, arguments.batch_size)
    if other is not None:
        own = {key_of(each): each["score"] for each in questions}
        comparisons = [asdict(each) for each in compare(own, other)]
        found["comparison"] = {"against": str(arguments.against), "tasks": comparisons}
    folder = arguments.out or default_folder(path)
    print(write_results(folder, found, questions))
    print(f"results: {folder / RESULTS}")
    missing = [each for each in found.get("suite", {}).get("tasks", ()) if "not_run" in each]
    if missing:
        raise Fault("\n".join(f"not run: {each['not_run']}" for each in missing))


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


def _checked_suite(arguments: Namespace) -> Suite | None:
    if arguments.suite is None:
        if arguments.against is not None:
            raise UserError("--against compares answers to tasks, and needs --suite.")
        return None
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")
    suite = load_suite(arguments.suite)
    try:
        from moh_megatron.evaluate.harness import check_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"--suite needs {error.name}. Run: pip install '.[eval]'") from None
    check_tasks(suite)
    return suite


def _run_suite(
    subject: Subject, suite: Suite, limit: int | None, batch_size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The section ``suite`` of results.json, and every question."""
    from moh_megatron.evaluate.harness import language_model, run_task

    model = language_model(subject, batch_size)
    tasks: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for task in suite.tasks:
        try:
            score, answered = run_task(model, suite, task, limit)
        except UserError as error:
            tasks.append({"task": task.task, "shots": task.shots, "metric": task.metric, "not_run": str(error)})
            continue
        tasks.append(asdict(score))
        questions += [{"of": task.task, **asdict(each)} for each in answered]
    section = {
        "name": suite.name,
        "description": suite.description,
        "limit": limit,
        "tasks": tasks,
        "published": [asdict(each) for each in suite.published],
    }
    return section, questions


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
