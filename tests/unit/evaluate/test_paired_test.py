"""Paired comparison, averages, the Markdown page, and suites that cannot be used."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy import stats

from moh_megatron.evaluate.paired_test import compare_scores, mcnemar, read_questions
from moh_megatron.evaluate.results import average, markdown, write_results
from moh_megatron.evaluate.suite import load_suite
from moh_megatron.io.errors import UserError

SUITES = Path(__file__).parents[3] / "configs" / "eval"


def scores(task, values):
    return {(task, task, number, f"hash {number}"): float(value) for number, value in enumerate(values)}


def test_mcnemar_is_the_exact_binomial_test_of_discordant_pairs():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar(2, 8) == mcnemar(8, 2)
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


def test_scores_are_compared_task_by_task_and_over_all():
    first = {**scores("a", [1, 1, 1, 0]), **scores("b", [0.5, 1.5, 2.5])}
    second = {**scores("a", [1, 0, 0, 0]), **scores("b", [1.0, 2.0, 3.1])}
    first_task, second_task, both = compare_scores(first, second)
    assert (first_task.task, first_task.questions, first_task.difference, first_task.better, first_task.worse) == (
        "a",
        4,
        0.5,
        2,
        0,
    )
    assert first_task.p_value == 0.5
    assert first_task.standard_error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert second_task.difference == pytest.approx(-1.6 / 3)
    assert second_task.p_value == pytest.approx(stats.ttest_rel([0.5, 1.5, 2.5], [1.0, 2.0, 3.1]).pvalue)
    assert (both.task, both.questions) == ("all", 7)


def test_p_value_of_one_question_or_of_differences_without_spread():
    (one,) = compare_scores(scores("a", [0.5]), scores("a", [0.1]))
    assert (one.p_value, one.standard_error) == (None, None)
    (alike,) = compare_scores(scores("a", [0.5, 0.5]), scores("a", [0.1, 0.1]))
    assert alike.p_value == mcnemar(2, 0) == 0.5
    (same,) = compare_scores(scores("a", [0.5, 0.7]), scores("a", [0.5, 0.7]))
    assert same.p_value == 1.0
    found = {**results(), "comparison": {"against": "other", "tasks": [asdict(one)]}}
    assert "| a | 1 | +40.0 | 1 / 0 |  |" in markdown(found)


def test_only_questions_that_both_answered_are_compared():
    (found,) = compare_scores(scores("a", [1, 0, 1]), scores("a", [1, 1]))
    assert (found.questions, found.worse) == (2, 1)
    with pytest.raises(UserError, match="share no question"):
        compare_scores(scores("a", [1]), scores("b", [1]))


def results(**suite):
    tasks = [
        {"task": "a", "shots": 0, "metric": "acc", "value": 0.5, "standard_error": 0.03, "questions": 100},
        {"task": "b", "shots": 5, "metric": "acc", "value": 0.3, "standard_error": 0.04, "questions": 100},
    ]
    published = [{"model": "theirs", "source": "somewhere", "average": 43.9}]
    section = {"name": "s", "description": "d", "limit": 100, "tasks": tasks, "published": published, **suite}
    model = {"path": "m", "kind": "folder", "step": None, "tokens": None}
    return {"model": model, "dtype": "fp32", "suite": section}


def test_every_number_in_the_page_says_where_it_comes_from(tmp_path):
    page = results()
    assert average(page["suite"]) == pytest.approx((0.4, 0.025))
    text = write_results(tmp_path, page, [{"of": "a", "task": "a", "id": 0, "hash": "h", "answer": "1", "score": 1.0}])
    assert "| a | 0 | acc | 100 | 50.0 ± 3.0 | measured here |" in text
    assert "| this model | 40.0 ± 2.5 | measured here |" in text
    assert "| theirs | 43.9 | published: somewhere |" in text
    assert (tmp_path / "results.md").read_text() == text
    assert json.loads((tmp_path / "results.json").read_text()) == page
    assert read_questions(tmp_path) == {("a", "a", 0, "h"): 1.0}
    assert read_questions(tmp_path / "results.json") == {("a", "a", 0, "h"): 1.0}


def test_a_task_that_was_not_run_has_no_number_and_no_average():
    page = results()
    page["suite"]["tasks"][1] = {"task": "b", "shots": 5, "metric": "acc", "not_run": "b: cannot be reached"}
    text = markdown(page)
    assert "| b | 5 | acc |  |  | not run: b: cannot be reached |" in text
    assert "| this model |  | not run: 1 of 2 tasks were |" in text


def test_the_page_says_that_no_text_is_held_out():
    page = {"model": {"path": "m", "kind": "folder", "step": None}, "dtype": "fp32"}
    assert "No text is held out" in markdown({**page, "validation": {"loss": None, "sources": {}}})


def test_missing_questions_are_refused(tmp_path):
    with pytest.raises(UserError, match="questions of an evaluation"):
        read_questions(tmp_path)
    (tmp_path / "questions.jsonl").touch()
    with pytest.raises(UserError, match=f"^--against: {tmp_path}/typo is not there"):
        read_questions(tmp_path / "typo")


@pytest.mark.parametrize(("name", "tasks"), [("offline", 6), ("paper_6", 6), ("paper_14", 14)])
def test_shipped_suites_have_the_expected_tasks_and_shots(name, tasks):
    suite = load_suite(SUITES / f"{name}.yaml")
    assert (suite.name, len(suite.tasks)) == (name, tasks)
    shots = {task.task: task.shots for task in suite.tasks if task.shots}
    if name == "paper_14":
        assert shots == {
            "mmlu": 5, "ceval-valid": 5, "cmmlu": 5, "gsm8k": 8, "hellaswag": 10, "boolq": 32, "nq_open": 32,
            "arc_challenge": 25,
        }  # fmt: skip
    else:
        assert shots == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\ndescription: y\ntasks: [{task: a, shots: -1, metric: acc}]", "tasks.0.shots"),
        ("name: x\ndescription: y\ntask: []", "must be a suite, as in configs/eval. task"),
        ("name: x\nname: y", "name"),
        ("{", ""),
    ],
)
def test_a_file_that_is_no_suite_is_refused(tmp_path, text, expected):
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_suite(file)
    assert str(error.value).startswith(str(file))


def test_data_that_are_not_installed_are_refused_with_the_command_to_install_them(tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(
        "name: x\ndescription: y\npackage: no_such_package\ninstall: pip install it\n"
        "tasks: [{task: a, shots: 0, metric: acc, data: folder}]"
    )
    suite = load_suite(file)
    with pytest.raises(UserError, match=r"a: its data are in the package no_such_package.*Run: pip install it"):
        suite.data_folder(suite.tasks[0])
    with pytest.raises(UserError, match=r"no such file"):
        load_suite(tmp_path / "other.yaml")
