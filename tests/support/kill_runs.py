"""Starts runs, kills them with -9 and resumes them until they finish: kill_runs.py SPECIFICATION.json RESULT.json

Imports take many seconds and training one. So this process imports, and forks the ranks of each start; they run what
each rank of ``pipelines/pretrain.py`` runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import moh_megatron.train.loop  # noqa: F401  (imported once for all ranks)
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.train.fault_tolerance.signals import StopRequest, die_with
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.rank import run_rank

_RUN_TIMEOUT, _EXIT_TIMEOUT = 180.0, 60.0
_POLL_SECONDS = 0.001
_MOMENTS = ("step", "save", "step", "save", "start")
_LONGEST_DELAY = {"step": 0.05, "save": 0.01, "start": 2.0}
"""The longest delay in seconds between a moment and the kill."""


@dataclass
class Kill:
    """A kill and the state that it left."""

    moment: str
    step: int
    """The last step in metrics.jsonl."""
    complete: int
    """The step of the newest complete checkpoint."""
    in_flight: int | None
    """The step of the checkpoint that was being written, if any."""
    seconds: float
    """How long it took until the last rank ended."""


def start(config: Config, ranks: int, log: Path) -> list[int]:
    """Fork all ranks of a run; return their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    parent = os.getpid()
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            stop = StopRequest.install()
            die_with(parent)
            code = run_rank(config, World(rank, ranks, rank), stop)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pids


def wait_all(pids: list[int], limit: float) -> list[int]:
    """Return all exit codes, negative for a signal; after ``limit`` seconds kill the rest and raise TimeoutError."""
    deadline, codes = time.monotonic() + limit, dict[int, int]()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"{len(pids) - len(codes)} of {len(pids)} ranks hang after {limit} s")
        time.sleep(_POLL_SECONDS)
    return [codes[pid] for pid in pids]


def recorded_steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_of(folder: Path, prefix: str) -> list[int]:
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"{prefix}step_(\d+)", name)))


def newest_complete(folder: Path) -> int:
    return max(steps_of(folder, ""), default=0)


def in_flight(folder: Path, since: float) -> int | None:
    """Return the step of the checkpoint that a run started at ``since`` is writing.

    A partial folder of a step before the newest complete one is being deleted by retention; one that is older than
    ``since`` was left by an earlier start.
    """
    newest = newest_complete(folder)
    for step in steps_of(folder, r"\.partial_"):
        with contextlib.suppress(FileNotFoundError):
            partial = folder / "checkpoints" / f".partial_step_{step:08d}"
            if step > newest and partial.stat().st_ctime >= since:
                return step
    return None


def run_and_kill(config: Config, ranks: int, draw: random.Random, moment: str, log: Path) -> Kill | None:
    """Start a run and kill it at random, after a "step", in a "save" or at the "start"; None if it finished."""
    folder, interval = Path(config.run.dir), config.checkpoint.interval
    done, earlier = newest_complete(folder), _inode(folder)
    target, delay, victim = done + draw.randint(1, 2 * interval - 1), draw.random(), draw.randrange(ranks)
    started = time.time()
    pids = start(config, ranks, log)
    deadline = time.monotonic() + _RUN_TIMEOUT
    while moment != "start":
        # When this run begins to train, it replaces the file by one without the steps it repeats.
        steps = recorded_steps(folder) if _inode(folder) != earlier else 0
        if steps >= target if moment == "step" else steps and in_flight(folder, started):
            break
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            codes = wait_all(pids, _EXIT_TIMEOUT)
            assert codes == [0] * ranks, f"{codes}: {log.read_text()[-3000:]}"
            return None
        assert time.monotonic() < deadline, f"no such moment in {_RUN_TIMEOUT} s: {log.read_text()[-3000:]}"
        time.sleep(_POLL_SECONDS)
    time.sleep(delay * _LONGEST_DELAY[moment])
    # Ranks that have not met yet would wait for each other, and there is no launcher to end them: kill all.
    for pid in pids if moment == "start" else [pids[victim]]:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_all(pids, _EXIT_TIMEOUT)
    return Kill(
        moment, recorded_steps(folder), newest_complete(folder), in_flight(folder, started), time.monotonic() - killed
    )


def _inode(folder: Path) -> int | None:
    path = folder / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def curve(config: Config) -> list[list[Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")] for line in lines]


def campaign(file: str, overrides: list[str], ranks: int, kills: int, seed: int, folder: str) -> dict[str, Any]:
    """Run once without kills, and once with ``kills`` kills at moments in turn."""
    uninterrupted = load_config(file, [*overrides, f"run.dir={folder}/uninterrupted"])
    codes = wait_all(start(uninterrupted, ranks, Path(f"{folder}/uninterrupted.log")), _RUN_TIMEOUT)
    assert codes == [0] * ranks, Path(f"{folder}/uninterrupted.log").read_text()[-3000:]
    killed = load_config(file, [*overrides, f"run.dir={folder}/killed"])
    log, draw, done = Path(f"{folder}/killed.log"), random.Random(seed), list[Kill]()
    for index in range(kills):
        kill = run_and_kill(killed, ranks, draw, _MOMENTS[index % len(_MOMENTS)], log)
        assert kill is not None, f"finished after {index} of {kills} kills"
        done.append(kill)
    codes = wait_all(start(killed, ranks, log), _RUN_TIMEOUT)
    assert codes == [0] * ranks, log.read_text()[-3000:]
    return {"kills": [asdict(kill) for kill in done], "uninterrupted": curve(uninterrupted), "killed": curve(killed)}


if __name__ == "__main__":
    specification, result = map(Path, sys.argv[1:])
    outcomes = {name: campaign(**values) for name, values in json.loads(specification.read_text()).items()}
    result.write_text(json.dumps(outcomes))
