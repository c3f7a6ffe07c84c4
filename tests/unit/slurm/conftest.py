"""A job without a Slurm: Slurm's commands and Python are stood in for, and the job's own rules are at work."""

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
    """One job: its script is run life after life, as Slurm would, until it does not requeue itself."""

    def __init__(self, folder: Path) -> None:
        self.run, self.acts = folder / "run", folder / "acts"
        self.log, self._calls, self._programs = folder / "log", folder / "calls", folder / "programs"
        # Slurm runs a copy, apart from its neighbours.
        self.copy = folder / "spool/slurm_script"
        for each in (self.run, self.acts, self._programs, self.copy.parent):
            each.mkdir()
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
        """What a script does in a life: ``pretrain_0="exit 1"``."""
        for name, act in acts.items():
            script, _, life = name.rpartition("_")
            (self.acts / f"{script}.py.{life}").write_text(act + "\n")

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    def called(self, command: str) -> list[str]:
        """The calls that begin so."""
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
        """The log's last line."""
        return self.log.read_text().splitlines()[-1]

    def live(self, script: str, *arguments: str, life: int = 0, **variables: str) -> int:
        """Exit code of one life."""
        shutil.copy(FOLDER / script, self.copy)
        of_job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "name",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_JOB_PARTITION": "main",
            "SLURM_NNODES": "1",
            "SLURM_NTASKS": "2",
            "SHOWN": f"JobId=7 TimeLimit=01:00:00 ExcNodeList=(null)\n   Command={FOLDER / script} CONFIG a b.sh",
        }
        if life:
            of_job["SLURM_RESTART_COUNT"] = str(life)
        with self.log.open("a") as log:
            return subprocess.run(
                ["bash", str(self.copy), *arguments],
                cwd=self.run,
                env=self.variables | of_job | variables,
                stdout=log,
                stderr=log,
                check=False,
                timeout=60,
            ).returncode

    def lives(self, script: str, *arguments: str, **variables: str) -> int:
        """Exit code of the last life; at most ten."""
        for life in range(10):
            requeued = len(self.called("scontrol requeue"))
            code = self.live(script, *arguments, life=life, **variables)
            if len(self.called("scontrol requeue")) == requeued:
                return code
        raise AssertionError(f"it never ends: {self.log.read_text()}")

    def type(self, script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A script as a user types it."""
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
