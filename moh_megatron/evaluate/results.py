"""results.json, the answers to every question, and a Markdown page in which each number says what it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moh_megatron.evaluate.paired_test import QUESTIONS
from moh_megatron.io.json_file import write_json

RESULTS, TABLE = "results.json", "results.md"
MEASURED, PUBLISHED, NOT_RUN = "measured here", "published", "not run"
"""What a number is."""
NOTHING_HELD_OUT = "No text is held out: data.validation_fraction is 0."
VALIDATION_COLUMNS = ("validation source", "nats a token", "perplexity", "sequences")
TASK_COLUMNS = ("task", "shots", "metric", "questions", "this model, %", "what it is")
AVERAGE_COLUMNS = ("model", "average, %", "what it is")
COMPARISON_COLUMNS = ("task", "questions", "difference, %", "better / worse", "p")


def write_results(folder: Path, found: dict[str, Any], questions: Sequence[dict[str, Any]]) -> str:
    """Write the files, each whole or not at all; returns the Markdown."""
    write_json(folder / RESULTS, found)
    text = markdown(found)
    _write_text(folder / TABLE, text)
    if questions:
        _write_text(folder / QUESTIONS, "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in questions))
    return text


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def markdown(found: dict[str, Any]) -> str:
    """Title, validation losses, tasks, averages beside published ones, the comparison: as far as there are any."""
    parts = [f"# {found['model']['path']}\n\n{model_line(found)}\n"]
    if "validation" in found:
        rows = validation_rows(found["validation"])
        parts.append(table(VALIDATION_COLUMNS, rows) if rows else f"{NOTHING_HELD_OUT}\n")
    if "suite" in found:
        suite = found["suite"]
        parts.append(f"## {suite_line(suite)}\n")
        parts.append(table(TASK_COLUMNS, task_rows(suite)))
        parts.append(table(AVERAGE_COLUMNS, averages(suite)))
    if "comparison" in found:
        comparison = found["comparison"]
        parts.append(f"## Against {comparison['against']}, question by question\n")
        parts.append(table(COMPARISON_COLUMNS, compared_rows(comparison["tasks"])))
    return "\n".join(parts)


def model_line(found: dict[str, Any]) -> str:
    """What was judged, how far it was trained, and in which precision."""
    model = found["model"]
    trained = f", step {model['step']:,}, {model['tokens']:,} tokens" if model["step"] is not None else ""
    return f"{model['kind']}{trained}, computed in {found['dtype']}"


def suite_line(suite: dict[str, Any]) -> str:
    """What was asked, and how much of it."""
    limit = f"; the first {suite['limit']} questions of each" if suite["limit"] else ""
    return f"{suite['name']}: {suite['description']}{limit}"


def validation_rows(validation: dict[str, Any]) -> list[tuple[object, ...]]:
    """A row a source, with ``VALIDATION_COLUMNS``."""
    return [
        (name, with_error(each["loss"], each["standard_error"], 4), f"{each['perplexity']:.2f}", each["sequences"])
        for name, each in validation["sources"].items()
    ]


def task_rows(suite: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row a task, with ``TASK_COLUMNS``."""
    for each in suite["tasks"]:
        what = (each["task"], each["shots"], each["metric"])
        if "not_run" in each:
            yield *what, "", "", f"{NOT_RUN}: {each['not_run']}"
        else:
            yield *what, each["questions"], percent(each["value"], each["standard_error"]), MEASURED


def average(suite: dict[str, Any]) -> tuple[float, float | None] | None:
    """Mean over the tasks and its standard error; None unless all were run."""
    tasks = suite["tasks"]
    if any("not_run" in each for each in tasks):
        return None
    errors = [each["standard_error"] for each in tasks]
    error = math.hypot(*errors) / len(tasks) if None not in errors else None
    return math.fsum(each["value"] for each in tasks) / len(tasks), error


def averages(suite: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """This model's average, then the published ones, with ``AVERAGE_COLUMNS``."""
    own = average(suite)
    if own is None:
        run = sum("not_run" not in each for each in suite["tasks"])
        yield "this model", "", f"{NOT_RUN}: {run} of {len(suite['tasks'])} tasks were"
    else:
        yield "this model", percent(*own), MEASURED
    for each in suite["published"]:
        yield each["model"], f"{each['average']:.1f}", f"{PUBLISHED}: {each['source']}"


def compared_rows(tasks: Iterable[dict[str, Any]]) -> Iterator[tuple[object, ...]]:
    """A row a task, with ``COMPARISON_COLUMNS``."""
    for each in tasks:
        difference = ("+" if each["difference"] > 0 else "") + percent(each["difference"], each["standard_error"])
        yield (
            each["task"],
            each["questions"],
            difference,
            f"{each['better']} / {each['worse']}",
            "" if each["p_value"] is None else f"{each['p_value']:.3g}",
        )


def percent(value: float, error: float | None) -> str:
    """48.1 ± 1.4"""
    return with_error(100 * value, None if error is None else 100 * error, 1)


def with_error(value: float, error: float | None, digits: int) -> str:
    """0.4812 ± 0.0031"""
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)
