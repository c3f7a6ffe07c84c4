"""Evaluations in the background of a training: when they start, and what they show."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moh_megatron.checkpoint.layout import checkpoint_name
from moh_megatron.io.errors import UserError
from moh_megatron.train.background_evaluation import BackgroundEvaluation
from moh_megatron.train.preflight import check_suite

SCRIPT = """
import json, os, sys, time
from pathlib import Path
assert "RANK" not in os.environ
out = Path(sys.argv[sys.argv.index("--out") + 1])
(out / "arguments").write_text(" ".join(sys.argv[1:]))
while (out.parents[1] / "wait").exists():
    time.sleep(0.02)
tasks = [{"task": "piqa", "value": 0.5}, {"task": "sciq", "not_run": "sciq: cannot be reached"}]
(out / "results.json").write_text(json.dumps({"suite": {"tasks": tasks}}))
sys.exit(2 if (out / "refuse").exists() else 1)
"""


class Watched:
    """An evaluation, its run folder, and the scores that it has shown."""

    def __init__(self, evaluation: BackgroundEvaluation, run: Path, shown: list[Any]) -> None:
        self.evaluation, self.run, self.shown = evaluation, run, shown

    def checkpoint(self, step: int) -> None:
        folder = self.run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")


@pytest.fixture
def watched(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Watched:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RANK", "0")
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    settings = {"evaluate.suite": "suite.yaml", "evaluate.interval": 10, "evaluate.limit": 7}
    config = tiny({"run.dir": str(tmp_path / "run"), **settings})
    shown: list[Any] = []
    evaluation = BackgroundEvaluation(config, lambda scores, step: shown.append((scores, step)), [str(script)])
    return Watched(evaluation, tmp_path / "run", shown)


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_checkpoint_is_evaluated_once_it_is_complete(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.evaluation.request(10)
    watched.evaluation.advance()
    assert not (watched.run / "eval").exists()
    watched.checkpoint(10)
    watched.evaluation.advance()
    watched.evaluation.finish(seconds=30)
    assert watched.shown == [({"piqa": 0.5}, 10)]
    folder = watched.run / "eval" / checkpoint_name(10)
    checkpoint = watched.run / "checkpoints" / checkpoint_name(10)
    expected = f"{checkpoint} --no-validation --suite suite.yaml --device cpu --out {folder} --limit 7"
    assert (folder / "arguments").read_text() == expected
    assert logged(caplog) == [
        ("INFO", "evaluation of step 10: piqa 0.500"),
        ("WARNING", f"evaluation of step 10 ended with code 1; see {folder / 'log.txt'}. Training goes on."),
    ]


def test_a_refused_evaluation_shows_no_results_of_an_earlier_one(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.checkpoint(10)
    folder = watched.run / "eval" / checkpoint_name(10)
    folder.mkdir(parents=True)
    (folder / "refuse").touch()
    watched.evaluation.request(10)
    watched.evaluation.finish(seconds=30)
    assert watched.shown == []
    ((level, message),) = logged(caplog)
    assert level == "WARNING"
    assert message.startswith("evaluation of step 10 ended with code 2")


def test_one_evaluation_at_a_time_and_none_outlives_the_training(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.checkpoint(10)
    watched.checkpoint(20)
    (watched.run / "wait").touch()
    for step in (10, 20):
        watched.evaluation.request(step)
        start = time.monotonic()
        assert watched.evaluation.in_use == {10, step}
        watched.evaluation.advance()
        assert time.monotonic() - start < 5
    assert watched.evaluation.in_use == {10}
    assert caplog.messages == ["evaluation of step 20 is left out: that of step 10 still runs"]
    watched.evaluation.finish(seconds=0.3)
    assert caplog.messages[1:] == ["evaluation of step 10 was ended before it was finished"]
    assert not watched.evaluation.in_use
    assert watched.shown == []


def test_a_folder_that_cannot_be_written_is_a_warning(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.checkpoint(10)
    (watched.run / "eval").write_text("a file")
    watched.evaluation.request(10)
    watched.evaluation.advance()
    ((level, message),) = logged(caplog)
    assert level == "WARNING"
    assert message.startswith("evaluation of step 10 cannot be started:")
    assert message.endswith("Training goes on without it.")


@pytest.mark.parametrize(
    ("task", "package", "expected"),
    [
        ("arc_eazy", "null", "evaluate.suite: s: arc_eazy: lm-eval .* knows no such task; near it: arc_easy"),
        ("arc_easy", "no_such_package", "evaluate.suite: arc_easy: its data are in the package no_such_package"),
    ],
)
def test_a_suite_that_cannot_be_run_is_refused_before_training(
    tiny: Callable[..., Any], tmp_path: Path, task: str, package: str, expected: str
) -> None:
    suite = tmp_path / "suite.yaml"
    data = "" if package == "null" else ", data: x"
    tasks = f"tasks: [{{task: {task}, shots: 0, metric: acc{data}}}]"
    suite.write_text(f"name: s\ndescription: d\npackage: {package}\n{tasks}")
    with pytest.raises(UserError, match=expected):
        check_suite(tiny({"evaluate.suite": str(suite), "evaluate.interval": 5}))
    check_suite(tiny())


def test_a_suite_that_can_be_run_is_accepted(tiny: Callable[..., Any]) -> None:
    suite = Path(__file__).parents[3] / "configs" / "eval" / "paper_14.yaml"
    check_suite(tiny({"evaluate.suite": str(suite), "evaluate.interval": 5}))
