"""The run report of files made by hand: missing parts, measured figures, and lines that can be told apart."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moh_megatron import run_report
from moh_megatron.commands.report import main
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.monitor.charts import curves
from moh_megatron.monitor.tensorboard import TensorBoard


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """A run of three steps, one of them not finite, with two validations without a loss and many alarms."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(tiny()))
    write(
        folder / "metrics.jsonl", [{"step": n, "tokens": 64 * n, "lm_loss": None if n == 2 else 3.0} for n in (1, 2, 3)]
    )
    sources = [{"a": 3.0, "b": None}, {"a": 2.0}]
    write(
        folder / "validation.jsonl",
        [{"step": n, "loss": None, "sources": losses, "sample": "text"} for n, losses in enumerate(sources, start=1)],
    )
    writer = TensorBoard(folder / "tensorboard", 0)
    for step in range(1, 31):
        writer.text("alarms", f"dead heads: number {step:02d}.", step)
    writer.close()
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def page_of(run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    out = run.parent / "not" / "there" / "report.html"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(out)])
    main()
    return out.read_text()


def test_a_run_without_validation_loss_and_with_many_alarms(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(run, monkeypatch)
    assert "training loss" in page
    assert "run: a" in page
    assert [int(number) for number in re.findall(r"dead heads: number (\d\d)", page)] == list(range(1, 31))


def test_every_part_of_an_evaluation_is_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"loss": 2.5, "standard_error": 0.1, "perplexity": 12.18, "sequences": 8, "tokens": 128}
    model = {"path": "m", "kind": "checkpoint", "step": 1257, "tokens": 5148672}
    alone, nothing, compared, tasks = ({"model": model, "dtype": "fp32"} for _ in range(4))
    alone["validation"] = {"loss": 2.5, "sources": {"books": source}}
    nothing["validation"] = {"loss": None, "sources": {}}
    task = {"task": "all", "questions": 9, "difference": 0.25, "standard_error": 0.1, "better": 5, "worse": 1}
    compared["comparison"] = {"against": "theirs", "tasks": [{**task, "p_value": 0.0625}]}
    scored = {"task": "piqa", "shots": 0, "metric": "acc", "value": 0.5, "standard_error": None, "questions": 5}
    tasks["suite"] = {"name": "s", "description": "d", "limit": 5, "tasks": [scored], "published": []}
    damaged = {**tasks, "suite": {"name": "s"}}
    evaluations = {
        "alone": alone,
        "nothing": nothing,
        "compared": compared,
        "tasks": tasks,
        "damaged": damaged,
        "list": [],
    }
    for name, found in evaluations.items():
        (run / "eval" / name).mkdir(parents=True)
        (run / "eval" / name / "results.json").write_text(json.dumps(found))
    page = page_of(run, monkeypatch)
    assert "<td>books</td><td>2.5000 ± 0.1000</td><td>12.18</td><td>8</td>" in page
    assert "No text is held out" in page
    assert "Against theirs" in page
    assert "<td>+25.0 ± 10.0</td><td>5 / 1</td><td>0.0625</td>" in page
    assert page.count("checkpoint, step 1,257, 5,148,672 tokens, computed in fp32") == 4
    assert "s: d; the first 5 questions of each" in page
    assert page.count("Its results.json is not as") == 2


def test_records_without_the_expected_keys_are_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "exit.json").write_text("null")
    for name in ("metrics.jsonl", "validation.jsonl", "restarts.jsonl"):
        with (run / name).open("a") as stream:
            stream.write('{"step": 9}\n')
    page = page_of(run, monkeypatch)
    assert "<td>run</td><td>3</td><td>192</td>" in page


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("folder", "folder must be a file. Got a folder; name one in it, such as .*folder/report.html"),
        ("file/report.html", "file: must be a folder to write to.*name another with --out"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, expected: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match=expected):
        main()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_has_the_same_style_in_every_chart_and_a_single_point_is_a_dot() -> None:
    drawn = curves("t", "u", [("none", []), ("dot", [(1.0, 2.0)]), ("line", [(0.0, 1.0), (1.0, 1.0)])])
    alone = curves("t", "u", [(name, [(0.0, 1.0), (1.0, 1.0)]) for name in "abc"])
    keys = re.compile(r'stroke="([^"]*)" stroke-dasharray="([^"]*)"/></svg>')
    assert keys.findall(drawn) == keys.findall(alone)[1:]
    assert drawn.count("<circle") == 1
    assert ">dot</text>" in drawn
    config: Any = SimpleNamespace(train=SimpleNamespace(tokens_per_step=1))
    validated = [{"step": 1, "loss": 2.0, "sources": {"a": 1.0}}]
    runs: Any = [SimpleNamespace(name=name, config=config, validations=validated) for name in ("one", "two")]
    assert [name for name, _ in run_report.validation(runs)] == ["one", "two", "one: a", "two: a"]


def test_lines_differ_without_colour() -> None:
    drawn = curves("t", "u", [(f"run {number}", [(0.0, number), (1.0, number + 1.0)]) for number in range(30)])
    keys = re.findall(r'class="key">.*?stroke-dasharray="([^"]*)".*?</svg>(.?) run \d+<', drawn)
    assert len(keys) == len(set(keys)) == 30
    colours = re.findall(r'class="curve" stroke="([^"]*)" stroke-dasharray="([^"]*)"', drawn)
    assert len(set(colours)) == 30, "colours and dashes together differ, too"


def test_starts_in_a_file_of_the_former_name_are_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run / "lives.jsonl", [{"step": 0, "time": 0.0, "ranks": 2, "code": "git former"}])
    write(run / "restarts.jsonl", [{"step": 2, "time": 60.0, "ranks": 4, "code": "git current"}])
    page = page_of(run, monkeypatch)
    assert page.index("git former") < page.index("git current")
    assert "<td>0</td><td>1</td><td>still running, or killed</td>" in page, "no bad step, one restart"
