"""Training jobs as a user submits them, and faults of their ranks."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import Cluster, wait_for
from support.runs import REPOSITORY, Run

SCRIPTS = REPOSITORY / "slurm"
CPU_NODES = ("--gpus-per-node=0", "--cpus-per-task=1")
LONG_STEPS, INTERVAL = 600, 50
LONG = (f"train.total_tokens={LONG_STEPS * 8 * 32}", f"checkpoint.interval={INTERVAL}", "train.eval_interval=0")
"""A run long enough for a fault in the middle."""
STRICT = (*LONG, "checkpoint.async=false")
"""A save is complete before the next step, so that at most one interval is lost."""
CURVE = ("step", "loss", "lm_loss", "grad_norm", "lr")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MOH_FREE_GIB": "0",
    "MOH_PYTHON": str(REPOSITORY / ".venv/bin/python"),
    "RESTART_PAUSE": "1",
    "MOH_WAIT_SECONDS": "20",
}


def curve(run: Run) -> list[list[Any]]:
    """Return the values of each step that do not depend on how, and how often, the run was started."""
    return [[record[key] for key in CURVE] for record in run.records()]


@dataclass
class Job:
    """A run folder and the jobs submitted for it."""

    cluster: Cluster
    run: Run
    ids: list[int] = field(default_factory=list)

    @property
    def id(self) -> int:
        return self.ids[-1]

    @property
    def log(self) -> str:
        path = self.run.folder.with_suffix(f".{self.id}.log")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def arguments(self, *overrides: str) -> list[str]:
        return [str(self.run.config), f"run.dir={self.run.folder}", f"data.dir={self.run.data}", *overrides]

    def submit(self, *flags: str, overrides: tuple[str, ...] = (), script: str = "pretrain_moh.sh", **more: str) -> int:
        """Submit to CPU nodes, by default to one node with two ranks."""
        output = f"--output={self.run.folder}.%j.log"
        flags = ("--ntasks-per-node=2", *CPU_NODES, output, *flags)
        command = [*flags, str(SCRIPTS / script), *self.arguments(*overrides)]
        self.ids.append(self.cluster.submit(*command, **(ENVIRONMENT | more)))
        return self.id

    def wait(self, seconds: float = 400) -> str:
        """Wait for the end of the job; return its state."""
        return self.cluster.wait(self.id, seconds)["JobState"]

    def end(self) -> None:
        for job in self.ids:
            self.cluster.user("scancel", str(job))

    def history(self) -> list[list[str]]:
        path = self.run.folder / "slurm/history.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[str]:
        """Return the starts and ends of the job."""
        return [line[3] for line in self.history()]

    def resumed(self) -> list[int]:
        """Return the steps after which starts resumed."""
        return [int(step) for step in re.findall(r"resumed after step (\d+)", self.log)]

    def repeated(self) -> int:
        """Return how many recorded steps the second start, the last one, trained again."""
        (resumed,) = self.resumed()
        _, recorded = (line[5] for line in self.history() if line[3] == "start")
        return int(recorded) - resumed

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        metrics = self.run.folder / "metrics.jsonl"

        def reached() -> bool:
            assert self.cluster.job(self.id)["JobState"] not in ("COMPLETED", "FAILED"), self.log
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= step

        wait_for(f"step {step}", reached, seconds, lambda: self.log)

    def wait_for_event(self, event: str, count: int = 1, seconds: float = 200) -> None:
        wait_for(f"{count} times {event}", lambda: self.events().count(event) >= count, seconds, lambda: self.log)

    def rank(self, number: int) -> int:
        """Return the process id of a rank, as seen from outside the cluster."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            trains = words[1:2] == [str(REPOSITORY / "pipelines/pretrain.py").encode()]
            ours = f"run.dir={self.run.folder}".encode() in words
            if trains and ours and f"SLURM_PROCID={number}".encode() in environment:
                return int(process.name)
        raise AssertionError(f"rank {number} does not run: {self.log}")

    def kill_rank(self, number: int) -> None:
        os.kill(self.rank(number), signal.SIGKILL)

    @contextmanager
    def held(self, number: int) -> Iterator[int]:
        """Pause the run in its current step: stop one rank, for which the others wait."""
        process = self.rank(number)
        os.kill(process, signal.SIGSTOP)
        try:
            wait_for(f"stop of {process}", lambda: stopped(process), 10)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def fields(process: int) -> dict[str, str]:
    """Return the status fields of a process by name; none for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in lines)


def stopped(process: int) -> bool:
    return fields(process).get("State", "").startswith("T")


def signalled(process: int, signum: int) -> bool:
    """Return whether a stopped process got a signal: it is pending, or Slurm has also continued the process."""
    pending = int(fields(process).get("ShdPnd", "0"), 16)
    return not stopped(process) or bool(pending >> (signum - 1) & 1)
