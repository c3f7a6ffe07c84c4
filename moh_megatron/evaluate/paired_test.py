"""Two models on the same questions: is the difference more than chance?"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moh_megatron.io.errors import UserError

QUESTIONS = "questions.jsonl"
Key = tuple[str, str, int, str]
"""Suite's task, member of a group, number, hash of the question."""


@dataclass(frozen=True)
class Comparison:
    """Of one task, or of all."""

    task: str
    questions: int
    difference: float
    """Mean score of the first model minus that of the second."""
    standard_error: float | None
    """Of the paired difference."""
    better: int
    """Questions on which the first model scores higher."""
    worse: int
    p_value: float | None
    """Two-sided: how often chance alone makes a difference as large. None for a single question."""


def read_questions(folder: Path) -> dict[Key, float]:
    """The scores of an evaluation that was written to ``folder``. Raises UserError."""
    if not folder.exists():
        raise UserError(
            f"--against: {folder} is not there. Name the folder of an evaluation, such as runs/RUN/eval/hf."
        )
    path = folder / QUESTIONS if folder.is_dir() else folder.with_name(QUESTIONS)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {key_of(record): record["score"] for record in records}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: must be the questions of an evaluation by pipelines/evaluate.py --suite. It cannot be read: "
            f"{error}."
        ) from None


def key_of(record: Mapping[str, Any]) -> Key:
    return record["of"], record["task"], record["id"], record["hash"]


def compare(first: Mapping[Key, float], second: Mapping[Key, float]) -> list[Comparison]:
    """Task by task, then all of them; over the questions that both answered.

    Raises UserError where there is none.
    """
    shared = [key for key in first if key in second]
    if not shared:
        raise UserError("The two evaluations share no question. Evaluate both on the same suite and limit.")
    tasks = list(dict.fromkeys(key[0] for key in shared))
    found = [_compared(task, [key for key in shared if key[0] == task], first, second) for task in tasks]
    return found if len(tasks) == 1 else [*found, _compared("all", shared, first, second)]


def _compared(task: str, keys: Sequence[Key], first: Mapping[Key, float], second: Mapping[Key, float]) -> Comparison:
    differences = [first[key] - second[key] for key in keys]
    better, worse = sum(each > 0 for each in differences), sum(each < 0 for each in differences)
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    p_value = _p_value(differences, better, worse) if len(differences) > 1 else None
    return Comparison(task, len(keys), mean, error, better, worse, p_value)


def _p_value(differences: Sequence[float], better: int, worse: int) -> float:
    """McNemar's exact test of scores that are right or wrong, else a paired t-test; without a spread to hold a
    difference against, signs alone."""
    if all(each in (-1.0, 0.0, 1.0) for each in differences) or len(set(differences)) == 1:
        return mcnemar(better, worse)
    from scipy import stats  # comes with lm-eval, whose results these are; reports do without

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of so many discordant pairs under an even chance for either side."""
    from scipy import stats

    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
