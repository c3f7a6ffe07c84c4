"""Mistakes that moh-evaluate and moh-generate find before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.early import run_without_slow_imports

SUITE = """name: s
description: d
package: no_such_package
install: pip install it
tasks: [{task: arc_easy, shots: 0, metric: acc, data: x}]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that might hold a model, with a suite whose package is missing."""
    (tmp_path / "model").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("evaluate", ["nowhere"], "nowhere: no such folder"),
        ("evaluate", ["model", "--suite", "paper_6", "--against", "missing"], "--against: missing is not there"),
        ("evaluate", ["model", "--against", "model"], "--against compares answers to tasks, and needs --suite"),
        ("evaluate", ["model", "--suite", "suite.yaml"], "its data are in the package no_such_package"),
        ("evaluate", ["model", "--suite", "none.yaml"], "none.yaml: no such file"),
        ("evaluate", ["model", "--config", "smoke", "data.dir=missing"], "No prepared data at missing"),
        ("evaluate", ["model", "--config", "smoke", "data.dirs=missing"], "did you mean 'dir'?"),
        ("evaluate", ["model", "--no-validation"], "leaves nothing to measure"),
        ("evaluate", ["model", "--suite", "paper_6", "--limit", "0"], "--limit must be at least 1. Got 0"),
        ("evaluate", ["model", "--out", "suite.yaml"], "suite.yaml: must be a folder to write to"),
        ("evaluate", ["model"], "model holds no complete checkpoint"),
        ("evaluate", ["export"], "export: no training configuration lies in or beside it"),
        ("generate", ["smoke", "generate.load=missing"], "missing: no such folder. Expected an exported folder"),
        ("generate", ["smoke"], "runs/smoke: no such run folder. Train first"),
        ("generate", ["missing/hf"], "missing/hf: no such file"),
    ],
)
def test_mistake_is_found_before_anything_slow_is_imported(
    folder: Path, command: str, arguments: list[str], expected: str
) -> None:
    ((code, errors),) = run_without_slow_imports([(command, *arguments)], folder)
    assert code == 2, errors
    assert "Traceback" not in errors
    assert expected in errors
