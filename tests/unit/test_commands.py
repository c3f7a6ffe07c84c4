"""The console commands: each exists, shows its help without torch, and is what the scripts of a checkout run."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import pytest

REPOSITORY = Path(__file__).parents[2]
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["deepspeed"] = sys.modules["transformers"] = None
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def console_scripts() -> dict[str, str]:
    """module:function by command, as setup.py states them."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(REPOSITORY / "setup.py"))
    scripts = setup.call_args.kwargs["entry_points"]["console_scripts"]
    return dict(script.split(" = ") for script in scripts)


COMMANDS = console_scripts()
MODULES = {command: target.partition(":")[0] for command, target in COMMANDS.items()}


def test_the_eight_commands_are_declared():
    names = ("prepare", "pretrain", "tune", "convert", "generate", "evaluate", "plan", "report")
    assert set(COMMANDS) == {f"moh-{name}" for name in names}


@pytest.mark.parametrize("command", COMMANDS)
def test_module_of_a_command_has_run_and_main(command):
    module, _, function = COMMANDS[command].partition(":")
    assert function == "run"
    assert callable(import_module(module).run)
    assert callable(import_module(module).main)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_torch(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, MODULES[command], "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    for option in ("--quiet", "--verbose", "--version"):
        assert option in done.stdout


@pytest.mark.usefixtures("own_signal_mask")
@pytest.mark.parametrize("command", COMMANDS)
def test_version_of_a_command_is_that_of_the_package(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as ended:
        import_module(MODULES[command]).run()
    assert ended.value.code == 0
    assert capsys.readouterr() == (f"moh-megatron {version('moh-megatron')}\n", "")


SMOKE = str(REPOSITORY / "configs" / "smoke.yaml")
EMPTY_PATHS = {
    "moh-prepare": [[""], [SMOKE, "--tokenizer", ""]],
    "moh-pretrain": [[""]],
    "moh-tune": [[""]],
    "moh-convert": [
        ["megatron-to-hf", "--load-dir", "", "--hf-dir", "hf"],
        ["megatron-to-hf", "--load-dir", "run", "--hf-dir", ""],
        ["megatron-to-hf", "--load-dir", "run", "--hf-dir", "hf", "--summary", ""],
        ["hf-to-megatron", "--hf-dir", "", "--save-dir", "checkpoint"],
        ["hf-to-megatron", "--hf-dir", "hf", "--save-dir", ""],
        ["hf-to-megatron", "--hf-dir", "hf", "--save-dir", "checkpoint", "--config", ""],
        ["official-to-hf", "--load-dir", "", "--hf-dir", "hf"],
    ],
    "moh-generate": [[""]],
    "moh-evaluate": [[""], *(["run", option, ""] for option in ("--config", "--suite", "--against", "--out"))],
    "moh-plan": [["", "--world-size", "2"]],
    "moh-report": [[""], ["run", ""], ["run", "--out", ""]],
}


@pytest.mark.usefixtures("own_signal_mask")
@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_path_is_refused_and_not_the_current_folder(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments in EMPTY_PATHS[command]:
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        with pytest.raises(SystemExit) as ended:
            import_module(MODULES[command]).run()
        assert ended.value.code == 2, arguments
        message = "must name a file or folder, such as . for the current one. Got an empty text\n"
        assert capsys.readouterr().err.endswith(message), arguments
    assert list(tmp_path.iterdir()) == []


SCRIPTS = [
    *sorted((REPOSITORY / "pipelines").glob("*.py")),
    *(REPOSITORY / f"tools/{name}.py" for name in ("plan", "report")),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_script_runs_the_function_of_the_console_command(script):
    module = f"moh_megatron.commands.{script.stem}"
    assert module in MODULES.values()
    assert runpy.run_path(str(script))["run"] is import_module(module).run


def test_every_command_has_a_script():
    assert {f"moh_megatron.commands.{script.stem}" for script in SCRIPTS} == set(MODULES.values())
