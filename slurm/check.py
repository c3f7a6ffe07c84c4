#!/usr/bin/env python
"""Checks the configuration and data of a training job, and prints its run folder; the job scripts call it first.

.venv/bin/python slurm/check.py CONFIG.yaml [section.key=value ...] --world-size N [N ...] [--no-data | --report]
                                [--snapshot NAME]

With --report it warns of data and of a run folder that it would refuse otherwise, for a dry run. With --snapshot it
records configuration, code and environment of this start in <run.dir>/slurm/NAME.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.config.load import dump_config
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.json_file import write_json
from moh_megatron.io.printable import printable

logger = logging.getLogger("moh_megatron.slurm.check")

REPOSITORY = Path(__file__).resolve().parents[1]
_RECORDED = re.compile(
    r"(SLURM|SLURMD|MOH|NCCL|TORCH_NCCL|GLOO|CUDA|OMP|MALLOC|MASTER|UCX|FI|HF_HUB_OFFLINE)(_|$)|MAX_RESTARTS"
)
"""The variables that a snapshot records; others may hold secrets."""
_SECRET = re.compile("JWT|TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
"""Variables that it does not record even so: SLURM_JWT, for one, gives access to a user's account on the cluster."""

_REMOVED = "[removed]"
_NAMED_SECRET = re.compile(
    r"""(?x)
    (                                               # a name that tells a secret: of a variable, or of a setting
        (?:\b|_|(?<=-))[A-Z0-9_]*(?:JWT|TOKEN(?!IZER)|KEY|SECRET|PASSWORD|CREDENTIAL)[A-Z0-9_]*
        | (?i:[\w.-]*(?:password|passwd|secret|credential|private_?key|access_?key|api[_-]?key
            |(?:access|auth|bearer|hf|hub|wandb|github|gitlab|session)[_-]?token)[\w-]*)
    )
    (["']?\s*[:=]\s*)                              # what stands between: '=', ': ' or '": '
    (?: "[^"\n]*" | '[^'\n]*' | [^\s"',;&()\[\]{}]+ )
    """
)
_OPTION_WITH_SECRET = re.compile(r"(--[\w-]*(?:token|password|secret|key|credential)[\w-]*\s+)\S+")
_SECRET_ITSELF = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|eyJ[\w-]+\.[\w-]+\.[\w-]+)"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"  # user and password of an address
)
"""Tokens whose form tells what they are: of Hugging Face, GitHub, GitLab, Slack and AWS, and JSON web tokens."""
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_SHORTEST_SECRET = 8
"""A shorter value of a secret variable is not searched for in texts: it may be an ordinary word."""

REFUSED_LATER = (
    "Without --dry-run this is refused, unless MOH_NO_DATA_HERE=1 says that the nodes have what is missing here; what "
    "depends on it was not checked."
)
WRITABLE = "run.dir must be a folder that can be written."


def check_resume(config: Config, world_size: int, data_hash: str) -> None:
    """Raise UserError if the newest readable checkpoint of the run folder belongs to another run."""
    root = checkpoint_dir(config)
    if not root.is_dir():
        return
    # Imported here because these imports take seconds, and a new run does not need them.
    from moh_megatron.checkpoint.layout import complete_checkpoints
    from moh_megatron.train.resume import check_same_run

    if config.moh.shared_placement == "calibrated":
        from moh_megatron.upcycle.initial_checkpoint import resolve
        from moh_megatron.upcycle.source import initial_checkpoint_folder

        if initial_checkpoint_folder(config).is_dir():  # the ranks do the same
            config = resolve(config)
    for folder, _ in complete_checkpoints(root):
        check_same_run(folder, config, world_size, data_hash)
        return


def check_folder(run_dir: Path) -> None:
    """Raise UserError if ``run_dir`` cannot be created or written; tried with a temporary folder."""
    try:
        existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        with TemporaryDirectory(prefix=".moh-", dir=existing):
            return
    except OSError as error:
        raise UserError(f"{run_dir}: {error.strerror}. {WRITABLE}") from None


def check_files(config: Config, world_size: int, run_dir: Path | None) -> None:
    """Raise UserError if the run cannot start with the data and the run folder that are on this machine.

    Where ``run_dir`` is given, it must be a folder that can be written.
    """
    from moh_megatron.train.preflight import preflight

    if run_dir is not None:
        check_folder(run_dir)
    check_resume(config, world_size, preflight(config, world_size).hash)


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",  # A changed file may have another encoding.
            check=True,
        ).stdout.rstrip("\n")
    except (OSError, subprocess.CalledProcessError):
        return None  # git is not installed, or this is not a clone


def _is_recorded(name: str) -> bool:
    return bool(_RECORDED.match(name)) and not _SECRET.search(name)


def without_secrets(text: str) -> str:
    """``text`` with [removed] for values of secret variables, values that a name calls secret, and well-known tokens.

    No line is added or taken out, so that a patch stays a patch.
    """
    text = _PRIVATE_KEY.sub(lambda match: re.sub(r"(?m)(^[+ -]?).+$", rf"\1{_REMOVED}", match[0]), text)
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _REMOVED)
    return _SECRET_ITSELF.sub(_REMOVED, _NAMED_SECRET.sub(rf"\1\2{_REMOVED}", text))


def shown_command(arguments: list[str]) -> str:
    """A command line that a shell accepts, ``without_secrets``."""
    named = (argument.partition("=") for argument in arguments)
    kept = [
        f"{name}={_REMOVED}" if equals and _NAMED_SECRET.search(f"{name}=x") else without_secrets(name + equals + value)
        for name, equals, value in named
    ]
    return _OPTION_WITH_SECRET.sub(rf"\1{_REMOVED}", shlex.join(kept))


def snapshot(config: Config, folder: Path) -> None:
    """Write config.yaml, job.json and, if the code has uncommitted changes, code.patch; ``folder`` may exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(without_secrets(dump_config(config)), encoding="utf-8")
    patch = _git("diff", "HEAD")
    if patch:
        (folder / "code.patch").write_text(without_secrets(patch) + "\n", encoding="utf-8")
    write_json(
        folder / "job.json",
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shown_command(sys.argv),
            "commit": _git("rev-parse", "HEAD"),
            "changed": None if patch is None else bool(patch),
            "nodes": os.environ.get("MOH_NODES", platform.node()).split(),
            "environment": {
                name: without_secrets(value) for name, value in sorted(os.environ.items()) if _is_recorded(name)
            },
            "python": platform.python_version(),
            "packages": dict(sorted((package.name, package.version) for package in distributions())),
        },
    )


def main() -> None:
    parser = config_parser("Check the configuration and data of a training job, and print its run folder.")
    parser.add_argument("--world-size", type=int, required=True, nargs="+", metavar="N", help="numbers of ranks")
    parser.add_argument("--no-data", action="store_true", help="the prepared data is not on this machine")
    parser.add_argument("--report", action="store_true", help="warn of data and of a run folder that would be refused")
    parser.add_argument("--snapshot", metavar="NAME", help="record this start in <run.dir>/slurm/NAME")
    arguments, config = parse_config(parser)
    from moh_megatron.train.preflight import check_settings

    for ranks in arguments.world_size:
        check_settings(config, ranks)
    run_dir = Path(config.run.dir).absolute()
    if (shown := printable(str(run_dir))) != str(run_dir) or "\n" in shown:
        # The job scripts read it as one line, and show it.
        raise UserError(f"run.dir must be a path without control characters. Got {shown}; name another folder.")
    if not arguments.no_data:
        try:
            check_files(config, arguments.world_size[-1], run_dir if arguments.snapshot is None else None)
        except UserError as error:
            if not arguments.report:
                raise
            logger.warning(f"{error} {REFUSED_LATER}")
    if arguments.snapshot is not None:
        try:
            snapshot(config, run_dir / "slurm" / arguments.snapshot)
        except OSError as error:
            # The message leaves out the file: its name differs in each start, and the same failure must be recognised.
            user_error = isinstance(error, NotADirectoryError | FileExistsError)
            raise (UserError if user_error else Fault)(f"{run_dir}: {error.strerror}. {WRITABLE}") from None
    print(run_dir)


if __name__ == "__main__":
    sys.exit(exit_code(main))
