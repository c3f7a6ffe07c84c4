"""Compares the scores of two models on the same questions, with paired significance tests."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import read_small_text

QUESTIONS = "questions.jsonl"
Key = tuple[str, str, int, str]
"""(task of the suite, member of a group, id of the question, its hash)."""


@dataclass(frozen=True)
class Comparison:
    """Two models on one task, or on all of them."""

    task: str
    """``all`` for all of them."""
    questions: int
    difference: float
    """Mean score of the first model minus that of the second."""
    standard_error: float | None
    """Standard error of the mean paired difference; None for a single question."""
    better: int
    """Questions on which the first model scores higher."""
    worse: int
    p_value: float | None
    """Two-sided: the probability of a difference as large by chance alone. None for a single question."""


def read_questions(folder: Path) -> dict[Key, float]:
    """The scores of the evaluation in ``folder``, or beside its results.json. Raises UserError."""
    if not folder.exists():
        raise UserError(
            f"--against: {folder} is not there. Name the folder of an evaluation, such as runs/RUN/eval/hf."
        )
    path = folder / QUESTIONS if folder.is_dir() else folder.with_name(QUESTIONS)
    try:
        records = [json.loads(line) for line in read_small_text(path).splitlines()]
        return {key_of(record): record["score"] for record in records}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: must be the questions of an evaluation by moh-evaluate --suite. It cannot be read: {error}."
        ) from None


def key_of(record: Mapping[str, Any]) -> Key:
    """The key of a line of ``QUESTIONS``."""
    return record["of"], record["task"], record["id"], record["hash"]


def compare_scores(first: Mapping[Key, float], second: Mapping[Key, float]) -> list[Comparison]:
    """One comparison for each task, then, of several, one for all; over the questions that both models answered.

    Raises UserError where there is no such question.
    """
    shared = [key for key in first if key in second]
    if not shared:
        raise UserError("The two evaluations share no question. Evaluate both on the same suite and limit.")
    tasks = list(dict.fromkeys(key[0] for key in shared))
    comparisons = [_compare_task(task, [key for key in shared if key[0] == task], first, second) for task in tasks]
    return comparisons if len(tasks) == 1 else [*comparisons, _compare_task("all", shared, first, second)]


def _compare_task(
    task: str, keys: Sequence[Key], first: Mapping[Key, float], second: Mapping[Key, float]
) -> Comparison:
    differences = [first[key] - second[key] for key in keys]
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    p_value = _p_value(differences, better, worse) if len(differences) > 1 else None
    return Comparison(task, len(keys), mean, error, better, worse, p_value)


def _p_value(differences: Sequence[float], better: int, worse: int) -> float:
    """McNemar's exact test for scores that are right or wrong, else a paired t-test.

    Differences without any spread have no t statistic: McNemar's test then counts their signs.
    """
    if all(value in (-1.0, 0.0, 1.0) for value in differences) or len(set(differences)) == 1:
        return mcnemar(better, worse)
    # Imported here because reports read this module's results without scipy, which comes with lm-eval.
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of so many discordant pairs, each as likely to fall on either side (McNemar's test)."""
    from scipy import stats

    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
