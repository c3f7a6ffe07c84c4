"""Train, kill -9, train on, until the run is finished: python kill_runs.py SPECIFICATION.json RESULT.json

A process imports for many seconds and trains for one. So this one imports, and each life of a run is forked from it:
the ranks run what ``pipelines/pretrain.py`` runs in each of its own.
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

import moh_megatron.train.loop  # noqa: F401  (what every life would import anew)
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.train.fault_tolerance.signals import StopRequest, die_with
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.rank import run_rank

_LONGEST_LIFE, _LONGEST_END = 180.0, 60.0
_POLL_SECONDS = 0.001
_MOMENTS = ("step", "save", "step", "save", "start")
_LATEST = {"step": 0.05, "save": 0.01, "start": 2.0}
"""Seconds after the beginning of a moment until when the kill comes."""


@dataclass
class Death:
    """One kill, and what it left."""

    moment: str
    step: int
    """The last step that was recorded."""
    complete: int
    """The newest checkpoint."""
    in_flight: int | None
    """The checkpoint that was being written, if one was."""
    seconds: float
    """How long the last rank lived on."""


def start(config: Config, ranks: int, log: Path) -> list[int]:
    """Fork every rank of one life; returns their process ids."""
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
    """Exit codes of all, negative for a signal; whoever outlives ``limit`` seconds is killed, and an error raised."""
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


def recorded(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def steps_of(folder: Path, prefix: str) -> list[int]:
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(rf"{prefix}step_(\d+)", name)))


def newest_complete(folder: Path) -> int:
    return max(steps_of(folder, ""), default=0)


def in_flight(folder: Path, since: float) -> int | None:
    """The checkpoint that a life begun at ``since`` is writing.

    A partial folder of an earlier step than the newest complete one is what retention deletes; one that is older than
    this life was left behind by another.
    """
    newest = newest_complete(folder)
    for step in steps_of(folder, r"\.partial_"):
        with contextlib.suppress(FileNotFoundError):
            partial = folder / "checkpoints" / f".partial_step_{step:08d}"
            if step > newest and partial.stat().st_ctime >= since:
                return step
    return None


def live_and_die(config: Config, ranks: int, draw: random.Random, moment: str, log: Path) -> Death | None:
    """One life, ended at a drawn moment: at a "step", in a "save" or at the "start"; None if it came to its end."""
    folder, interval = Path(config.run.dir), config.checkpoint.interval
    done, earlier = newest_complete(folder), _inode(folder)
    target, delay, victim = done + draw.randint(1, 2 * interval - 1), draw.random(), draw.randrange(ranks)
    born = time.time()
    pids = start(config, ranks, log)
    deadline = time.monotonic() + _LONGEST_LIFE
    while moment != "start":
        # Lines of an earlier life are cut, in a new file, when this one begins to train.
        steps = recorded(folder) if _inode(folder) != earlier else 0
        if steps >= target if moment == "step" else steps and in_flight(folder, born):
            break
        if os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
            codes = wait_all(pids, _LONGEST_END)
            assert codes == [0] * ranks, f"{codes}: {log.read_text()[-3000:]}"
            return None
        assert time.monotonic() < deadline, f"no such moment in {_LONGEST_LIFE} s: {log.read_text()[-3000:]}"
        time.sleep(_POLL_SECONDS)
    time.sleep(delay * _LATEST[moment])
    # Ranks that have not met yet would wait for each other: the launcher, which is not here, ends them.
    for pid in pids if moment == "start" else [pids[victim]]:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_all(pids, _LONGEST_END)
    return Death(moment, recorded(folder), newest_complete(folder), in_flight(folder, born), time.monotonic() - killed)


def _inode(folder: Path) -> int | None:
    path = folder / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def curve(config: Config) -> list[list[Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")] for line in lines]


def campaign(file: str, overrides: list[str], ranks: int, kills: int, seed: int, folder: str) -> dict[str, Any]:
    """An undisturbed run, and one that is killed ``kills`` times, every other time in a save."""
    whole = load_config(file, [*overrides, f"run.dir={folder}/whole"])
    codes = wait_all(start(whole, ranks, Path(f"{folder}/whole.log")), _LONGEST_LIFE)
    assert codes == [0] * ranks, Path(f"{folder}/whole.log").read_text()[-3000:]
    killed = load_config(file, [*overrides, f"run.dir={folder}/killed"])
    log, draw, deaths = Path(f"{folder}/killed.log"), random.Random(seed), list[Death]()
    for index in range(kills):
        death = live_and_die(killed, ranks, draw, _MOMENTS[index % len(_MOMENTS)], log)
        assert death is not None, f"finished after {index} of {kills} kills"
        deaths.append(death)
    codes = wait_all(start(killed, ranks, log), _LONGEST_LIFE)
    assert codes == [0] * ranks, log.read_text()[-3000:]
    return {"deaths": [asdict(death) for death in deaths], "whole": curve(whole), "killed": curve(killed)}


if __name__ == "__main__":
    specification, result = map(Path, sys.argv[1:])
    outcomes = {name: campaign(**values) for name, values in json.loads(specification.read_text()).items()}
    result.write_text(json.dumps(outcomes))
