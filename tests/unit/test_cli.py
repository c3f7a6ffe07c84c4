import argparse
import errno
import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moh_megatron.cli import at_least, command_parser, config_parser, exit_code, new_file, parse_config, path_argument
from moh_megatron.config.load import load_config
from moh_megatron.io.console import is_quiet, is_verbose, progress_bar
from moh_megatron.io.errors import Fault, UserError

_REPOSITORY = Path(__file__).parents[2]
_SMOKE = str(_REPOSITORY / "configs/smoke.yaml")


def exit_code_of(error):
    def main():
        raise error

    return exit_code(main)


@pytest.mark.parametrize("result", [None, 0, 2, 75])
def test_code_that_main_returns_is_kept(result):
    assert exit_code(lambda: result) == (result or 0)


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("run.dir: no."), 2, "error: run.dir: no.\n"),
        (UserError("first\nsecond"), 2, "error: first\n       second\n"),
        (Fault("step_3: broken."), 1, "error: step_3: broken.\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            1,
            "error: runs/x: No space left on device; free some space or set run.dir to a disk that has more; "
            "finished checkpoints are intact.\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs/x"),
            1,
            "error: runs/x: Read-only file system; set run.dir to a folder that can be written.\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            1,
            "error: runs/x: Permission denied; change its permissions or use another path.\n",
        ),
        (
            OSError(errno.EIO, "Input/output error", "runs/x"),
            1,
            "error: runs/x: Input/output error; the disk or the connection to it is failing: see the system's log, or "
            "set run.dir to another disk.\n",
        ),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", "runs/x"),
            2,
            "error: runs/x: Too many levels of symbolic links. Name another path.\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "runs/x"),
            2,
            "error: runs/x: File name too long. Name another path.\n",
        ),
        (
            RuntimeError("Symlink loop from '/runs/x'"),
            2,
            "error: Symlink loop from '/runs/x': links form a circle. Name another path.\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "error: No space left on device; free some space or set run.dir to a disk that has more; finished "
            "checkpoints are intact.\n",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_expected_error_is_one_message_on_standard_error(capsys, error, code, printed):
    assert exit_code_of(error) == code
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), FileNotFoundError(errno.ENOENT, "oops", "x")])
def test_bug_shows_its_traceback(capsys, error):
    assert exit_code_of(error) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "oops" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        [_SMOKE, "run.seed=5", "optimizer.learning_rate=1e-3", "--nproc", "2"],
        [_SMOKE, "--nproc", "2", "run.seed=5", "optimizer.learning_rate=1e-3"],
        ["--nproc", "2", _SMOKE, "run.seed=5", "optimizer.learning_rate=1e-3"],
        [_SMOKE, "run.seed=5", "--nproc", "2", "optimizer.learning_rate=1e-3"],
    ],
)
def test_overrides_are_accepted_before_and_after_options(arguments):
    parser = config_parser("Do something.")
    parser.add_argument("--nproc", type=int)
    namespace, config = parse_config(parser, arguments)
    assert namespace.nproc == 2
    assert config == load_config(_SMOKE, ["run.seed=5", "optimizer.learning_rate=1e-3"])


def test_dry_run_prints_a_configuration_that_loads_again(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        parse_config(config_parser("Do something."), [_SMOKE, "--dry-run", "run.seed=5"])
    assert caught.value.code == 0
    (tmp_path / "resolved.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "resolved.yaml") == load_config(_SMOKE, ["run.seed=5"])


@pytest.mark.parametrize("below", ["", "runs/new"])
def test_run_folder_inside_a_checkpoint_is_refused(below, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "manifest.json").touch()
    run_dir = tmp_path / below
    with pytest.raises(UserError, match=rf"outside every checkpoint\. Got {run_dir}, and {tmp_path} is one\. Name"):
        parse_config(config_parser("Do something."), [_SMOKE, f"run.dir={run_dir}"])


def test_run_folder_that_is_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        UserError, match=rf"{tmp_path}/loop: cannot be a folder \(Too many levels of symbolic links\)\. Name another"
    ):
        parse_config(config_parser("Do something."), [_SMOKE, f"run.dir={tmp_path}/loop"])


@pytest.mark.parametrize(
    ("kind", "text", "got"),
    [
        (at_least(2), "1", "at least 2. Got 1"),
        (at_least(1), "-1", "at least 1. Got -1"),
        (at_least(1), "1.5", "at least 1. Got 1.5"),
        (new_file, ".", "Got a folder: ."),
        (new_file, "absent/file", "Got no such folder: absent/file"),
        (new_file, "", "Got an empty text"),
        (path_argument, "", "Got an empty text"),
    ],
)
def test_argument_types_refuse_other_values(kind, text, got):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value).endswith(got)


def test_argument_types_accept_valid_values(tmp_path):
    assert (at_least(2)("2"), at_least(1)("+7")) == (2, 7)
    assert new_file(str(tmp_path / "file")) == tmp_path / "file"


@pytest.mark.parametrize("arguments", [[], [_SMOKE, "--no-such-option"]])
def test_wrong_arguments_exit_with_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        parse_config(config_parser("Do something."), arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


logger = logging.getLogger("moh_megatron.example")


def command(*arguments: str, result: str = "42") -> int:
    """Exit code of a command that logs at every level, shows a progress bar and prints its result."""

    def main() -> None:
        command_parser("Do something.").parse_args(arguments)
        with progress_bar("encode", total=1, unit="document") as bar:
            bar.update()
        logger.debug("detail")
        logger.info("first\nsecond")
        logger.warning("careful\nit is hot")
        logger.error("failed\nfor a reason")
        print(result)

    return exit_code(main)


PROBLEMS = "warning: careful\nit is hot\nerror: failed\n       for a reason\n"


def test_command_shows_messages_and_progress_on_standard_error_only(capsys):
    assert command() == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert err.endswith(f"first\nsecond\n{PROBLEMS}")
    assert "encode: 100%" in err
    assert "detail" not in err


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet_command_shows_problems_and_its_result_without_a_progress_bar(capsys, option):
    assert command(option) == 0
    assert capsys.readouterr() == ("42\n", PROBLEMS)


@pytest.mark.parametrize("option", ["-v", "--verbose"])
def test_verbose_command_shows_details(capsys, option):
    assert command(option) == 0
    out, err = capsys.readouterr()
    assert out == "42\n"
    assert err.endswith(f"detail\nfirst\nsecond\n{PROBLEMS}")


def test_level_is_known_while_a_command_runs_and_restored_after_it():
    logger_of_package = logging.getLogger("moh_megatron")
    before = (logger_of_package.level, logger_of_package.propagate, [*logger_of_package.handlers])
    levels = {}
    for option in ("--quiet", "--verbose", None):

        def main(option=option):
            command_parser("Do something.").parse_args([option] if option else [])
            levels[option] = (is_quiet(), is_verbose())

        assert exit_code(main) == 0
    assert levels == {"--quiet": (True, False), "--verbose": (False, True), None: (False, False)}
    assert (logger_of_package.level, logger_of_package.propagate, logger_of_package.handlers) == before


def test_version_prints_that_of_the_package_and_ends_with_0(capsys):
    with pytest.raises(SystemExit) as caught:
        command("--version")
    assert caught.value.code == 0
    assert capsys.readouterr() == (f"moh-megatron {version('moh-megatron')}\n", "")


def test_records_are_shown_once_where_a_library_configures_the_root_logger(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        assert exit_code(lambda: logger.warning("once")) == 0
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "warning: once\n"


def test_process_ends_with_the_exit_code_and_one_message():
    code = (
        "import sys\n"
        "from moh_megatron.cli import config_parser, exit_code, parse_config\n"
        "sys.exit(exit_code(lambda: parse_config(config_parser('x')) and 0))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "configs/smoke.yaml", "moh.active_head=3"],
        cwd=_REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == "error: command line: moh.active_head: unknown key; did you mean 'active_heads'?\n"


def test_warnings_about_deliberate_choices_are_silent_from_the_first_import():
    code = (
        "import warnings\n"
        "import moh_megatron.cli\n"
        "for module in ('megatron.core.utils', 'torch.distributed', 'other'):\n"
        "    warnings.warn_explicit(f'of {module}', UserWarning, 'file', 1, module=module)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stderr == "file:1: UserWarning: of other\n"
