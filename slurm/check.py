#!/usr/bin/env python
"""Check what a job is about to train, and print its run folder; the job scripts call this before anything is started.

python slurm/check.py CONFIG.yaml [section.key=value ...] --world-size N [N ...] [--no-data] [--snapshot NAME]

With --snapshot it writes down in <run.dir>/slurm/NAME what this life of the run is made of.
"""

from __future__ import annotations

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

REPOSITORY = Path(__file__).resolve().parents[1]
_TOLD = re.compile(
    r"(SLURM|SLURMD|MOH|NCCL|TORCH_NCCL|GLOO|CUDA|OMP|MALLOC|MASTER|UCX|FI|HF_HUB_OFFLINE)(_|$)|MAX_RESTARTS"
)
"""The variables a snapshot keeps: an environment may hold secrets."""
_SECRET = re.compile("JWT|TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
"""And of those it does not: SLURM_JWT opens a user's account on the cluster."""

WRITABLE = "run.dir must be a folder that can be written."


def check_resume(config: Config, world_size: int, data_hash: str) -> None:
    """Raise UserError where the run folder's newest readable checkpoint is of another run."""
    root = checkpoint_dir(config)
    if not root.is_dir():
        return
    # Imported here: these take seconds, and a new run needs nothing of them.
    from moh_megatron.checkpoint.layout import complete_checkpoints
    from moh_megatron.train.resume import check_same_run

    if config.moh.shared_placement == "calibrated":
        from moh_megatron.upcycle.initial_checkpoint import initial_checkpoint_folder, resolve

        if initial_checkpoint_folder(config).is_dir():  # as its ranks train it
            config = resolve(config)
    for folder, _ in complete_checkpoints(root):
        check_same_run(folder, config, world_size, data_hash)
        return


def check_folder(run_dir: Path) -> None:
    """Raise UserError where ``run_dir`` could not be made or written, as a folder shows that comes and goes there."""
    try:
        there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
        with TemporaryDirectory(prefix=".moh-", dir=there):
            return
    except OSError as error:
        raise UserError(f"{run_dir}: {error.strerror}. {WRITABLE}") from None


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True
        ).stdout.rstrip("\n")
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or not a clone


def _told(name: str) -> bool:
    return bool(_TOLD.match(name)) and not _SECRET.search(name)


def snapshot(config: Config, folder: Path) -> None:
    """config.yaml, job.json and, where the code is not what was committed, code.patch; ``folder`` may be there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    patch = _git("diff", "HEAD")
    if patch:
        (folder / "code.patch").write_text(patch + "\n", encoding="utf-8")
    write_json(
        folder / "job.json",
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join(sys.argv),
            "commit": _git("rev-parse", "HEAD"),
            "changed": None if patch is None else bool(patch),
            "nodes": os.environ.get("MOH_NODES", platform.node()).split(),
            "environment": {name: value for name, value in sorted(os.environ.items()) if _told(name)},
            "python": platform.python_version(),
            "packages": dict(sorted((each.name, each.version) for each in distributions())),
        },
    )


def main() -> None:
    parser = config_parser("Check what a job is about to train, and print its run folder.")
    parser.add_argument("--world-size", type=int, required=True, nargs="+", metavar="N", help="ranks there may be")
    parser.add_argument("--no-data", action="store_true", help="the prepared data is not on this machine")
    parser.add_argument("--snapshot", metavar="NAME", help="write it down in <run.dir>/slurm/NAME")
    arguments, config = parse_config(parser)
    from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
    from moh_megatron.train.preflight import preflight

    for ranks in arguments.world_size:
        data_parallel_size(config, ranks)
        gradient_accumulation_steps(config, ranks)
    run_dir = Path(config.run.dir).absolute()
    if not arguments.no_data:
        if arguments.snapshot is None:
            check_folder(run_dir)
        ranks = arguments.world_size[-1]
        check_resume(config, ranks, preflight(config, ranks).hash)
    if arguments.snapshot is not None:
        try:
            snapshot(config, run_dir / "slurm" / arguments.snapshot)
        except OSError as error:
            # Not the file: it has the number of this life, and the same failure must be known again.
            mistake = isinstance(error, NotADirectoryError | FileExistsError)
            raise (UserError if mistake else Fault)(f"{run_dir}: {error.strerror}. {WRITABLE}") from None
    print(run_dir)


if __name__ == "__main__":
    sys.exit(exit_code(main))
