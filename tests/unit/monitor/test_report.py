"""The run report of files made by hand: missing parts, measured figures, and lines that can be told apart."""

from __future__ import annotations

import json
import logging
import math
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
from moh_megatron.monitor.run_folder import open_run
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
    writer = TensorBoard(folder, 0)
    for step in range(1, 31):
        writer.text("alarms", f"dead heads: number {step:02d}.", step)
    writer.close()
    return folder


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_load_of_heads_is_read_from_its_file_and_a_damaged_one_left_out(run: Path) -> None:
    (run / "head_load.json").write_text('{"step": 3, "load": [[1.0, 0.5], [0.25, 0.75]]}')
    assert open_run(run).head_load == [[1.0, 0.5], [0.25, 0.75]]
    for damaged in ('{"step": 3}', "[]", '{"load": [["x"]]}', '{"load": 3}', "{"):
        (run / "head_load.json").write_text(damaged)
        assert open_run(run).head_load == []


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


DAMAGED_STEPS = (
    "1",
    "null",
    "[" * 100_000,
    "\xff",
    '{"step": true, "tokens": 1}',
    '{"step": "9", "tokens": 1}',
    '{"step": 9, "tokens": null}',
    '{"step": 9, "tokens": [1]}',
    '{"step": -9, "tokens": 1}',
    '{"step": 9, "tokens": 1e400}',
    f'{{"step": 9, "tokens": {10**400}}}',
    '{"step": 9, "tokens": 9, "lm_loss": "low"}',
    '{"step": 9, "tokens": 9, "lm_loss": true}',
    '{"step": 9, "tokens": 9, "lm_loss": NaN}',
    f'{{"step": 9, "tokens": 9, "grad_norm": {10**400}}}',
    '{"step": 9, "tokens": 9, "lr": {}}',
    '{"step": 9, "tokens": 9, "skipped": "perhaps"}',
)
DAMAGED_VALIDATIONS = (
    '{"step": 9}',
    '{"step": 9, "loss": "low"}',
    '{"step": 9, "loss": [1]}',
    '{"step": 9, "loss": 1, "sources": 3}',
    '{"step": 9, "loss": 1, "sources": {"a": "low"}}',
)
DAMAGED_STARTS = (
    '{"step": null}',
    '{"step": 9, "time": "noon"}',
    '{"step": 9, "time": 1e300}',
    '{"step": 9, "time": null}',
)


def test_lines_with_values_of_another_type_are_left_out_and_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    added = {
        "metrics.jsonl": (*DAMAGED_STEPS, '{"step": 4, "tokens": 256, "lm_loss": 2.5, "extra": "any"}'),
        "validation.jsonl": (*DAMAGED_VALIDATIONS, '{"step": 4, "loss": 1.25, "sample": ["\\ud800"]}'),
        "restarts.jsonl": (*DAMAGED_STARTS, '{"step": 4, "time": 60, "ranks": [], "code": {"a": 1}}'),
    }
    for name, lines in added.items():
        with (run / name).open("a", encoding="latin-1") as stream:
            stream.writelines(f"{line}\n" for line in lines)
            stream.write('{"step": 9, "tok')  # A run is writing this line.
    (run / "exit.json").write_text('{"reason": 5}')
    results = {"huge": {"model": 1, "validation": {"loss": 10**400}}, "none": None}
    for name, content in results.items():
        (run / "eval" / name).mkdir(parents=True)
        (run / "eval" / name / "results.json").write_text(json.dumps(content))
    (run / "eval/none/results.json").write_text("[" * 100_000)
    (run / "skipped.jsonl").mkdir()
    page = page_of(run, monkeypatch)
    assert (
        "<td>run</td><td>4</td><td>256</td><td>1.2500</td><td>0</td><td>0</td><td>still running, or killed</td>" in page
    )
    counts = {
        "metrics.jsonl": len(DAMAGED_STEPS),
        "validation.jsonl": len(DAMAGED_VALIDATIONS),
        "restarts.jsonl": len(DAMAGED_STARTS),
        "skipped.jsonl": 1,
        "exit.json": 1,
        "eval/none/results.json": 1,
    }
    for name, count in counts.items():
        assert f"<td>run</td><td>{name}</td><td>{count}</td>" in page
        lines = "line" if count == 1 else "lines"
        assert f"{run / name}: {count} damaged {lines} left out." in caplog.messages
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) == len(counts)
    assert page.count("Its results.json is not as") == 1


def test_event_files_with_other_tags_and_values_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TensorBoard(run, 0)
    for tag in (
        "head_load/layer_x/head_0",
        "head_load/layer_0",
        "head_load/layer_0/head_0/more",
        "head_load/layer_0/head_",
    ):
        writer.scalars({tag: 0.5}, 1)
    writer.scalars({"head_load/layer_00/head_00": math.nan, "head_load/layer_00/head_01": 0.25}, 1)
    writer.scalars({"memory/largest_rank_gib": math.inf}, 1)
    writer.close()
    page = page_of(run, monkeypatch)
    assert page.count("<title>layer ") == 2
    assert "layer 0 head 1: 0.250" in page


@pytest.mark.parametrize("values", [(0.0, 5e-324), (1e100, -1e100), (0.0, 0.0)])
def test_chart_of_extreme_values_is_drawn(values: tuple[float, float]) -> None:
    assert curves("t", "u", [("a", list(enumerate(values)))]).count("<polyline") == 1
