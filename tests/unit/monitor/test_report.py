"""The run report from files made by hand: what is missing, what was measured, and that lines can be told apart."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.monitor.charts import curves
from moh_megatron.monitor.tensorboard import TensorBoard

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import report  # pyright: ignore[reportMissingImports]

    return report


@pytest.fixture
def run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """Three steps, of which one is not finite, validated twice without a number, with many alarms."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(tiny()))
    write(
        folder / "metrics.jsonl", [{"step": n, "tokens": 64 * n, "lm_loss": None if n == 2 else 3.0} for n in (1, 2, 3)]
    )
    sources = [{"a": 3.0, "b": None}, {"a": 2.0}]
    write(
        folder / "validation.jsonl",
        [{"step": n, "loss": None, "sources": each, "sample": "text"} for n, each in enumerate(sources, start=1)],
    )
    board = TensorBoard(folder / "tensorboard", 0)
    for step in range(1, 31):
        board.text("alarms", f"dead heads: number {step:02d}.", step)
    board.close()
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def page_of(report: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    out = run.parent / "not" / "there" / "report.html"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(out)])
    report.main()
    return out.read_text()


def test_a_run_without_validation_loss_and_with_many_alarms(
    report: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(report, run, monkeypatch)
    assert "training loss" in page
    assert "run: a" in page
    assert [int(number) for number in re.findall(r"dead heads: number (\d\d)", page)] == list(range(1, 31))


def test_every_part_of_an_evaluation_is_shown(report: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"loss": 2.5, "standard_error": 0.1, "perplexity": 12.18, "sequences": 8, "tokens": 128}
    alone, nothing, compared = ({"model": {}, "dtype": "fp32"} for _ in range(3))
    alone["validation"] = {"loss": 2.5, "sources": {"books": source}}
    nothing["validation"] = {"loss": None, "sources": {}}
    task = {"task": "all", "questions": 9, "difference": 0.25, "standard_error": 0.1, "better": 5, "worse": 1}
    compared["comparison"] = {"against": "theirs", "tasks": [{**task, "p_value": 0.0625}]}
    for name, found in (("alone", alone), ("nothing", nothing), ("compared", compared)):
        (run / "eval" / name).mkdir(parents=True)
        (run / "eval" / name / "results.json").write_text(json.dumps(found))
    page = page_of(report, run, monkeypatch)
    assert "<td>books</td><td>2.5000 ± 0.1000</td><td>12.18</td><td>8</td>" in page
    assert "No text is held out" in page
    assert "Against theirs" in page
    assert "<td>+25.0 ± 10.0</td><td>5 / 1</td><td>0.0625</td>" in page


def test_no_two_lines_look_alike_without_colour() -> None:
    drawn = curves("t", "u", [(f"run {number}", [(0.0, number), (1.0, number + 1.0)]) for number in range(30)])
    keys = re.findall(r'class="key">.*?stroke-dasharray="([^"]*)".*?</svg>(.?) run \d+<', drawn)
    assert len(keys) == len(set(keys)) == 30
    colours = re.findall(r'class="curve" stroke="([^"]*)" stroke-dasharray="([^"]*)"', drawn)
    assert len(set(colours)) == 30, "colour tells them apart as well"
