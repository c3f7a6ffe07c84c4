"""Writes and reads the results of an evaluation: results.json, the answers to all questions, and a Markdown page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moh_megatron.evaluate.paired_test import QUESTIONS
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import write_json
from moh_megatron.io.small_file import read_small_text

RESULTS, TABLE = "results.json", "results.md"
MEASURED, PUBLISHED, NOT_RUN = "measured here", "published", "not run"
"""Where a number in a table comes from."""
NOTHING_HELD_OUT = "No text is held out: data.validation_fraction is 0."
VALIDATION_COLUMNS = ("validation source", "nats a token", "perplexity", "sequences")
TASK_COLUMNS = ("task", "shots", "metric", "questions", "this model, %", "what it is")
AVERAGE_COLUMNS = ("model", "average, %", "what it is")
COMPARISON_COLUMNS = ("task", "questions", "difference, %", "better / worse", "p")


def write_results(folder: Path, results: dict[str, Any], questions: Sequence[dict[str, Any]]) -> str:
    """Write the three files, each atomically; returns the Markdown."""
    write_json(folder / RESULTS, results)
    text = markdown(results)
    _write_text(folder / TABLE, text)
    if questions:
        lines = (json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
        _write_text(folder / QUESTIONS, "".join(lines))
    return text


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_earlier_results(folder: Path, planned: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results and questions that an earlier evaluation left in ``folder``; both are empty where there are none.

    Raises UserError where ``planned``, results without their numbers, has another model, suite, limit or data: the new
    evaluation would replace the earlier one in place of adding to it.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}, []
    try:
        earlier = json.loads(read_small_text(path))
        earlier_conditions, planned_conditions = _conditions(earlier), _conditions(planned)
        answers = read_small_text(folder / QUESTIONS) if (folder / QUESTIONS).exists() else ""
        questions = [json.loads(line) for line in answers.splitlines()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: must be the results of an evaluation, to add to them. They cannot be read: {error!r}. Remove "
            "them or name another folder with --out."
        ) from None
    for name, value in planned_conditions.items():
        if name in earlier_conditions and earlier_conditions[name] != value:
            raise UserError(
                f"{folder}: holds an evaluation whose {name} is {earlier_conditions[name]}. Here it is {value}: name "
                "another folder with --out, or remove that one."
            )
    return earlier, questions


def _conditions(results: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of what each part of ``results`` was measured on."""
    model = {**results["model"], "path": str(Path(results["model"]["path"]).resolve())}
    parts: dict[str, dict[str, Any]] = {"model": model, "software": results["software"]}
    if "validation" in results:
        parts["validation"] = results["validation"]["of"]
    if "suite" in results:
        suite = results["suite"]
        tasks = ", ".join(f"{task['task']} {task['metric']} {task['shots']}-shot" for task in suite["tasks"])
        parts["suite"] = {"name": suite["name"], "limit": suite["limit"], "tasks": tasks}
    if "comparison" in results:
        parts["comparison"] = {"against": results["comparison"]["against"]}
    named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {"dtype": results["dtype"], **named}


def markdown(results: dict[str, Any]) -> str:
    """The Markdown page: title, validation losses, tasks, averages beside published ones, and the comparison, as far as
    ``results`` has them."""
    parts = [f"# {results['model']['path']}\n\n{model_line(results)}\n"]
    if "validation" in results:
        rows = validation_rows(results["validation"])
        parts.append(table(VALIDATION_COLUMNS, rows) if rows else f"{NOTHING_HELD_OUT}\n")
    if "suite" in results:
        suite = results["suite"]
        parts.append(f"## {suite_line(suite)}\n")
        parts.append(table(TASK_COLUMNS, task_rows(suite)))
        parts.append(table(AVERAGE_COLUMNS, average_rows(suite)))
    if "comparison" in results:
        comparison = results["comparison"]
        parts.append(f"## Against {comparison['against']}, question by question\n")
        parts.append(table(COMPARISON_COLUMNS, comparison_rows(comparison["tasks"])))
    return "\n".join(parts)


def model_line(results: dict[str, Any]) -> str:
    """One line: the kind of model, how far it was trained, and the precision of the evaluation."""
    model = results["model"]
    trained = f", step {model['step']:,}, {model['tokens']:,} tokens" if model["step"] is not None else ""
    return f"{model['kind']}{trained}, computed in {results['dtype']}"


def suite_line(suite: dict[str, Any]) -> str:
    """One line: the suite's name, description and limit."""
    limit = f"; the first {suite['limit']} questions of each" if suite["limit"] else ""
    return f"{suite['name']}: {suite['description']}{limit}"


def validation_rows(validation: dict[str, Any]) -> list[tuple[object, ...]]:
    """One row for each source, with ``VALIDATION_COLUMNS``."""
    return [
        (
            name,
            with_error(source["loss"], source["standard_error"], 4),
            f"{source['perplexity']:.2f}",
            source["sequences"],
        )
        for name, source in validation["sources"].items()
    ]


def task_rows(suite: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """One row for each task, with ``TASK_COLUMNS``."""
    for task in suite["tasks"]:
        name = (task["task"], task["shots"], task["metric"])
        if "not_run" in task:
            yield *name, "", "", f"{NOT_RUN}: {task['not_run']}"
        else:
            yield *name, task["questions"], percent(task["value"], task["standard_error"]), MEASURED


def average(suite: dict[str, Any]) -> tuple[float, float | None] | None:
    """The mean over the tasks and its standard error; None unless all tasks were run."""
    tasks = suite["tasks"]
    if any("not_run" in task for task in tasks):
        return None
    errors = [task["standard_error"] for task in tasks]
    error = math.hypot(*errors) / len(tasks) if None not in errors else None
    return math.fsum(task["value"] for task in tasks) / len(tasks), error


def average_rows(suite: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """Rows of this model's average, then of the published ones, with ``AVERAGE_COLUMNS``."""
    own = average(suite)
    if own is None:
        run = sum("not_run" not in task for task in suite["tasks"])
        yield "this model", "", f"{NOT_RUN}: {run} of {len(suite['tasks'])} tasks were"
    else:
        yield "this model", percent(*own), MEASURED
    for published in suite["published"]:
        yield published["model"], f"{published['average']:.1f}", f"{PUBLISHED}: {published['source']}"


def comparison_rows(tasks: Iterable[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """One row for each task, with ``COMPARISON_COLUMNS``."""
    for task in tasks:
        difference = ("+" if task["difference"] > 0 else "") + percent(task["difference"], task["standard_error"])
        yield (
            task["task"],
            task["questions"],
            difference,
            f"{task['better']} / {task['worse']}",
            "" if task["p_value"] is None else f"{task['p_value']:.3g}",
        )


def percent(value: float, error: float | None) -> str:
    """A share with its standard error in per cent, such as 48.1 ± 1.4."""
    return with_error(100 * value, None if error is None else 100 * error, 1)


def with_error(value: float, error: float | None, digits: int) -> str:
    """A value with its standard error, such as 0.4812 ± 0.0031."""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
