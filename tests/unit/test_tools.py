"""What every tool does with arguments that are missing or wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CHECK_SMOKE = REPOSITORY / "tools" / "check_smoke.py"


def check_smoke(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CHECK_SMOKE), *map(str, arguments)],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_check_of_the_smoke_run_shows_its_help() -> None:
    done = check_smoke("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: check_smoke.py")


@pytest.mark.parametrize("present", [False, True], ids=["no folder", "empty folder"])
def test_check_of_the_smoke_run_refuses_a_folder_without_a_run(tmp_path: Path, present: bool) -> None:
    folder = tmp_path if present else tmp_path / "missing"
    done = check_smoke(folder)
    assert done.returncode == 2
    expected = f"error: {folder}/summary.json: no such file" if present else f"error: {folder}: no such folder"
    assert done.stderr.startswith(expected)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tool", sorted((REPOSITORY / "tools").glob("*.py")), ids=lambda tool: tool.name)
def test_no_tool_takes_its_arguments_by_position_without_a_parser(tool: Path) -> None:
    """Such a tool ends in a traceback for --help."""
    code = tool.read_text(encoding="utf-8")
    program, _, _ = code.partition("BARE = ")  # bench_data.py holds another program as text
    assert "sys.argv[" not in program
