"""Training jobs as a user submits them, and what may befall their ranks."""

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
"""Long enough that something can happen in the middle."""
STRICT = (*LONG, "checkpoint.async=false")
"""A save is whole before the next step: an interval is the most that can be lost."""
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
    """Every step's numbers that must not depend on who started the run, and how often."""
    return [[record[key] for key in CURVE] for record in run.records()]


@dataclass
class Job:
    """One run folder, and the jobs submitted for it."""

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
        """sbatch on CPU nodes, one node with two ranks unless flags say otherwise."""
        output = f"--output={self.run.folder}.%j.log"
        flags = ("--ntasks-per-node=2", *CPU_NODES, output, *flags)
        command = [*flags, str(SCRIPTS / script), *self.arguments(*overrides)]
        self.ids.append(self.cluster.submit(*command, **(ENVIRONMENT | more)))
        return self.id

    def wait(self, seconds: float = 400) -> str:
        """The state in which the job ended."""
        return self.cluster.wait(self.id, seconds)["JobState"]

    def end(self) -> None:
        for each in self.ids:
            self.cluster.user("scancel", str(each))

    def history(self) -> list[list[str]]:
        path = self.run.folder / "slurm/history.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    def events(self) -> list[str]:
        """How each life began and ended."""
        return [line[3] for line in self.history()]

    def resumed(self) -> list[int]:
        """After which steps lives went on."""
        return [int(step) for step in re.findall(r"resumed after step (\d+)", self.log)]

    def repeated(self) -> int:
        """Steps that the second life, the last, trained again: those after its start that the first one had told of."""
        (resumed,) = self.resumed()
        _, told = (line[5] for line in self.history() if line[3] == "start")
        return int(told) - resumed

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        metrics = self.run.folder / "metrics.jsonl"

        def reached() -> bool:
            assert self.cluster.job(self.id)["JobState"] not in ("COMPLETED", "FAILED"), self.log
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= step

        wait_for(f"step {step}", reached, seconds, lambda: self.log)

    def wait_for_event(self, event: str, count: int = 1, seconds: float = 200) -> None:
        wait_for(f"{count} times {event}", lambda: self.events().count(event) >= count, seconds, lambda: self.log)

    def rank(self, number: int) -> int:
        """Process id of a rank, as seen from outside the cluster."""
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
        """The run stands still at the step that it is in: a rank is stopped, and the others wait for it."""
        process = self.rank(number)
        os.kill(process, signal.SIGSTOP)
        try:
            wait_for(f"stop of {process}", lambda: stopped(process), 10)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def fields(process: int) -> dict[str, str]:
    """What Linux tells of a process, by name; nothing of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.split(":\t", 1) for line in lines)


def stopped(process: int) -> bool:
    return fields(process).get("State", "").startswith("T")


def signalled(process: int, signum: int) -> bool:
    """Whether a stopped process has got a signal: it waits there, or Slurm has woken the process together with it."""
    pending = int(fields(process).get("ShdPnd", "0"), 16)
    return not stopped(process) or bool(pending >> (signum - 1) & 1)
