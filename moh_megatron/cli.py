"""Parses the arguments that all commands share, and turns the way a command ends into its exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from moh_megatron.config.load import dump_config, load_config
from moh_megatron.config.paths import refuse_checkpoint
from moh_megatron.config.schema import Config
from moh_megatron.io.console import console_logging, print_result, set_level
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.printable import printable
from moh_megatron.io.remedies import remedy

# Megatron-core and torch warn of what is chosen on purpose: no Apex, no fused kernels, gloo. The filter stands here
# because the first of these warnings come while a command's other modules are imported.
warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")

logger = logging.getLogger(__name__)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors show arguments, which may be names of files, without control characters."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, None if message is None else printable(message))


class _SetLevel(argparse.Action):
    """Sets the level of the package's log records as soon as the option is parsed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        set_level(self.const)


def command_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of --quiet, --verbose and --version, to which a command adds its own options."""
    parser = CommandParser(description=description)
    add_common_options(parser)
    return parser


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, --verbose and --version to ``parser``."""
    for name, level, text in (
        ("quiet", logging.WARNING, "show warnings and errors only, and no progress bars"),
        ("verbose", logging.DEBUG, "show more, and what the libraries underneath say"),
    ):
        parser.add_argument(
            f"-{name[0]}", f"--{name}", action=_SetLevel, nargs=0, const=level, default=argparse.SUPPRESS, help=text
        )
    try:
        installed = version("moh-megatron")
    except PackageNotFoundError:
        installed = "(not installed)"
    parser.add_argument("--version", action="version", version=f"moh-megatron {installed}")


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code to a command that opens Hugging Face folders."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code in an exported folder whose classes neither Transformers nor this project has",
    )


def config_parser(description: str, also: str = "") -> argparse.ArgumentParser:
    """Return a parser of CONFIG, overrides and --dry-run besides the options of ``command_parser``.

    ``also`` says what else CONFIG may be.
    """
    parser = command_parser(description)
    parser.add_argument(
        "config",
        type=path_text,
        metavar="CONFIG",
        help=f"YAML file, or the name of an example that comes along, such as smoke{also}",
    )
    parser.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="a value that replaces the file's, such as parallel.tensor=1",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    return parser


def parse_config(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None = None,
    load: Callable[[str, Sequence[str]], Config] = load_config,
) -> tuple[argparse.Namespace, Config]:
    """Parse the arguments of a ``config_parser``, by default ``sys.argv``, and ``load`` the configuration they name.

    With --dry-run it prints the resolved configuration and raises SystemExit(0). Raises UserError.
    """
    namespace = parser.parse_intermixed_args(arguments)
    config = load(namespace.config, namespace.overrides)
    refuse_checkpoint(config.run.dir)
    if namespace.dry_run:
        print_result(dump_config(config).removesuffix("\n"))
        parser.exit(0)
    return namespace, config


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from ``least`` on."""

    def whole_number(text: str) -> int:
        if not re.fullmatch(r"\+?[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}. Got {text}")
        return int(text)

    return whole_number


def path_text(text: str) -> str:
    """Argparse type for a path or a name. An empty one, as of a variable that is not set, is not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, such as . for the current one. Got an empty text")
    return text


def path_argument(text: str) -> Path:
    """Argparse type for a path, as ``path_text``."""
    return Path(path_text(text))


def new_file(text: str) -> Path:
    """Argparse type for a file to write, in a folder that exists."""
    path = path_argument(text)
    if path.is_dir() or not path.parent.is_dir():
        got = "a folder" if path.is_dir() else "no such folder"
        raise argparse.ArgumentTypeError(f"must be a file to write, in a folder that is there. Got {got}: {text}")
    return path


def png_file(text: str) -> Path:
    """Argparse type for a .png file to write, as ``new_file``."""
    path = new_file(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png. Got {text}")
    return path


def parse_overrides(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse ``sys.argv`` with a parser of subcommands, some of which take ``overrides`` between their options too."""
    # argparse accepts positional arguments in one sequence only, and returns those behind a later option as unknown.
    arguments, rest = parser.parse_known_args()
    if unknown := [word for word in rest if word.startswith("-") or "overrides" not in arguments]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        arguments.overrides += rest
    return arguments


def exit_code(main: Callable[[], int | None]) -> int:
    """Run ``main`` with log records shown on standard error, and return its exit code for ``sys.exit``.

    The code is 2 for a UserError and 1 for a Fault or an error of the file system, with the message alone; 130 when
    interrupted; 1 with a traceback for anything else.
    """
    with console_logging():
        return _exit_code(main)


def _exit_code(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        if not error.reported:
            logger.error(error)
        return 2
    except Fault as error:
        logger.error(error)
        return 1
    except KeyboardInterrupt:
        return 130
    except (NotADirectoryError, FileExistsError) as error:
        logger.error(
            f"{error.filename}: a file stands where a folder is needed; set run.dir or data.dir to another path."
        )
        return 2
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            logger.error(f"{error.filename}: {error.strerror}. Name another path.")
            return 2
        hint = None if isinstance(error, FileNotFoundError) else remedy(error.errno, "run.dir")
        if hint is None:
            print_traceback()
        else:
            path = f"{error.filename}: " if error.filename is not None else ""
            logger.error(f"{path}{error.strerror}; {hint}.")
        return 1
    except RuntimeError as error:
        if not str(error).startswith("Symlink loop"):  # what Path.resolve raises in Python 3.11
            print_traceback()
            return 1
        logger.error(f"{error}: links form a circle. Name another path.")
        return 2
    except Exception:  # Any other error is a bug: show where.
        print_traceback()
        return 1


def print_traceback() -> None:
    """Print the traceback of the error that is handled on standard error."""
    sys.stderr.write(printable(traceback.format_exc()))
