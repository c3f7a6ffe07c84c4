"""Runs one evaluation: loads a model, measures it, and writes results.json, questions.jsonl and results.md."""

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
from moh_megatron.evaluate.held_out_loss import check_validation_data, validation_loss
from moh_megatron.evaluate.loaded_model import LoadedModel, load_model
from moh_megatron.evaluate.model_folder import find_model, tokenizer_folder, training_config
from moh_megatron.evaluate.paired_test import compare_scores, key_of, read_questions
from moh_megatron.evaluate.results import RESULTS, read_earlier_results, write_results
from moh_megatron.evaluate.suite import Suite, Task, load_suite
from moh_megatron.io.console import print_result
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.folders import check_writable


def evaluate(arguments: Namespace) -> None:
    """Run the command moh-evaluate with its parsed ``arguments``.

    Each result is written as soon as it is measured, task by task, beside the earlier results of the same model in the
    folder.

    Raises:
        UserError: before anything is measured.
        Fault: at the end, where a task could not be run or the other evaluation shares no question.
    """
    path = find_model(arguments.model)
    config = _training_config(arguments, path)
    suite, manager = checked_suite(arguments.suite) if arguments.suite is not None else (None, None)
    other_scores = read_questions(arguments.against) if arguments.against is not None else None
    folder = arguments.out or default_folder(path)
    check_writable(folder)
    device = _device(arguments.device)
    if config is not None:
        check_validation_data(config, tokenizer_folder(path))
    loaded = load_model(path, device, arguments.dtype, arguments.trust_remote_code)
    results: dict[str, Any] = {"model": loaded.described(), "dtype": arguments.dtype, "software": _software()}
    data = {"config": arguments.config and str(arguments.config), "overrides": arguments.overrides}
    planned = {
        **results,
        **({"validation": {"of": data}} if config is not None else {}),
        **({"suite": _suite_section(suite, arguments.limit)} if suite is not None else {}),
        **({"comparison": {"against": str(arguments.against)}} if other_scores is not None else {}),
    }
    earlier, questions = read_earlier_results(folder, planned)
    results = {**earlier, **results}
    if config is not None:
        results["validation"] = {**validation_loss(loaded, config), "of": data}
        write_results(folder, results, questions)
    problems: list[str] = []
    if suite is not None:
        section: dict[str, Any] = planned["suite"]
        section["tasks"] = earlier.get("suite", section)["tasks"]
        results["suite"] = section
        # A task that cannot be run again keeps the score and the questions of the earlier evaluation.
        kept, questions = questions, []
        for index, (task, answered) in enumerate(
            _run_tasks(loaded, suite, manager, arguments.limit, arguments.batch_size)
        ):
            if "not_run" in task:
                problems.append(f"not run: {task['not_run']}")
            if "not_run" not in task or "not_run" in section["tasks"][index]:
                section["tasks"][index] = task
                kept = [question for question in kept if question["of"] != task["task"]]
            questions += answered
            write_results(folder, results, questions + kept)
        questions += kept
    if other_scores is not None:
        scores = {key_of(question): question["score"] for question in questions}
        try:
            comparisons = [asdict(comparison) for comparison in compare_scores(scores, other_scores)]
            results["comparison"] = {"against": str(arguments.against), "tasks": comparisons}
        except UserError as error:
            problems.append(str(error))
    print_result(write_results(folder, results, questions))
    print_result(f"results: {folder / RESULTS}")
    if problems:
        raise Fault("\n".join(problems))


def default_folder(path: Path) -> Path:
    """The folder of results where --out names none: ``eval/NAME`` beside the model, or beside its checkpoints."""
    parent = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return parent / "eval" / path.name


def _training_config(arguments: Namespace, path: Path) -> Config | None:
    given: Path | None = arguments.config
    if arguments.no_validation:
        return None
    return load_config(given, arguments.overrides) if given else training_config(path, arguments.overrides)


def checked_suite(path: Path) -> tuple[Suite, Any]:
    """The suite and lm-eval's TaskManager. Raises UserError where that does not know a task of the suite."""
    suite = load_suite(path)
    suite.check_installed()
    try:
        from moh_megatron.evaluate.harness import find_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"--suite needs {error.name}. Run: pip install '.[eval]'") from None
    return suite, find_tasks(suite)


def _suite_section(suite: Suite, limit: int | None) -> dict[str, Any]:
    """The section ``suite`` of results.json before any task has run."""
    return {
        "name": suite.name,
        "description": suite.description,
        "limit": limit,
        "tasks": [_not_run(task, "not run yet") for task in suite.tasks],
        "published": [asdict(published) for published in suite.published],
    }


def _not_run(task: Task, reason: str) -> dict[str, Any]:
    return {"task": task.task, "shots": task.shots, "metric": task.metric, "not_run": reason}


def _run_tasks(
    loaded: LoadedModel, suite: Suite, manager: Any, limit: int | None, batch_size: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """For each task its entry in results.json and its questions."""
    from moh_megatron.evaluate.harness import run_task
    from moh_megatron.evaluate.lm_eval_models import language_model

    model = language_model(loaded, batch_size)
    for task in suite.tasks:
        try:
            score, answered = run_task(model, suite, task, limit, manager)
        except UserError as error:
            yield _not_run(task, str(error)), []
        else:
            yield asdict(score), [{"of": task.task, **asdict(question)} for question in answered]


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
