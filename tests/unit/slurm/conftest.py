"""Runs the job scripts without Slurm: stand-ins replace Slurm's commands and Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "slurm"
COMMANDS = Path(__file__).with_name("commands.sh")
STAND_IN = REPOSITORY / "tests/slurm/stand_in.sh"
KEPT = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MOH_"))}


class StandIn:
    """One job, whose script is started again as Slurm would, until it does not requeue itself."""

    def __init__(self, folder: Path) -> None:
        self.run, self.acts = folder / "run", folder / "acts"
        self.log, self._calls, self._programs = folder / "log", folder / "calls", folder / "programs"
        # Slurm runs a copy of the script without the files beside it.
        self.copy = folder / "spool/slurm_script"
        for path in (self.run, self.acts, self._programs, self.copy.parent):
            path.mkdir()
        for name in ("srun", "sbatch", "scontrol", "squeue", "sinfo"):
            (self._programs / name).symlink_to(COMMANDS)
        self.log.touch()
        self._calls.touch()
        self.variables = KEPT | {
            "PATH": f"{self._programs}:{KEPT['PATH']}",
            "CALLS": str(self._calls),
            "RUN": str(self.run),
            "ACTS": str(self.acts),
            "RESTART_PAUSE": "0",
            "MOH_PYTHON": str(STAND_IN),
        }

    def act(self, **acts: str) -> None:
        """Set what a script does in a start: ``pretrain_0="exit 1"``."""
        for name, act in acts.items():
            script, _, restart = name.rpartition("_")
            (self.acts / f"{script}.py.{restart}").write_text(act + "\n")

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    def called(self, command: str) -> list[str]:
        """Return the calls that begin with ``command``."""
        return [call for call in self.calls if call.startswith(command)]

    @property
    def history(self) -> list[list[str]]:
        path = self.run / "slurm/history.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def events(self) -> list[str]:
        return [line[3] for line in self.history]

    @property
    def last(self) -> str:
        """The last line of the log."""
        return self.log.read_text().splitlines()[-1]

    def start(self, script: str, *arguments: str, restart: int = 0, **variables: str) -> int:
        """Run the script once; return its exit code."""
        shutil.copy(FOLDER / script, self.copy)
        job_variables = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "name",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_PARTITION": "main",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
            "SHOWN": f"JobId=7 TimeLimit=01:00:00 ExcNodeList=(null)\n   Command={FOLDER / script} CONFIG a b.sh",
        }
        if restart:
            job_variables["SLURM_RESTART_COUNT"] = str(restart)
        with self.log.open("a") as log:
            return subprocess.run(
                ["bash", str(self.copy), *arguments],
                cwd=self.run,
                env=self.variables | job_variables | variables,
                stdout=log,
                stderr=log,
                check=False,
                timeout=60,
            ).returncode

    def run_to_end(self, script: str, *arguments: str, **variables: str) -> int:
        """Start the script until it does not requeue itself, at most ten times; return its last exit code."""
        for restart in range(10):
            requeued = len(self.called("scontrol requeue"))
            code = self.start(script, *arguments, restart=restart, **variables)
            if len(self.called("scontrol requeue")) == requeued:
                return code
        raise AssertionError(f"it never ends: {self.log.read_text()}")

    def type(self, script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script as a user types it."""
        return subprocess.run(
            [str(FOLDER / script), *arguments],
            cwd=REPOSITORY,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def job(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)
