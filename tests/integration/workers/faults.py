"""Runs that fail or are stopped, without a launcher; their ranks are forked from one process that has imported all.

python faults.py CONFIG DATA FOLDER CASE... writes a folder for each case, the logs of its ranks, and results.json.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moh_megatron.checkpoint import save
from moh_megatron.config.load import load_config
from moh_megatron.parallel import groups
from moh_megatron.train import loop, session
from moh_megatron.train.fault_tolerance.signals import StopRequest
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.rank import run_rank

RANKS = 2
ENDLESS = "train.total_tokens=2560000"
REPLICAS = "parallel.tensor=1"


@dataclass(frozen=True)
class Case:
    """Overrides, what differs on a rank, and what happens outside after a step was logged."""

    overrides: tuple[str, ...] = ()
    patch: Callable[[int, StopRequest], tuple[str, ...]] = lambda rank, stop: ()
    """Called in the rank before it starts; returns further overrides for it."""
    event: Callable[[Path, dict[int, int]], Any] | None = None
    """Called with the case's folder and the ranks' process ids."""
    after_step: int = 6
    """With more than 10, the event also waits for the checkpoint of step 10."""
    stopped: int | None = None
    """A rank that is stopped, so that only the system can end it."""
    timeout: float = 60.0


def scale_losses(factor: float, steps: range, ranks: tuple[int, ...]) -> Callable[[int, StopRequest], tuple[str, ...]]:
    """Multiply the losses of some steps (1 for the first) on some ranks."""

    def patch(rank: int, stop: StopRequest) -> tuple[str, ...]:
        original, calls = loop.token_losses, iter(range(10**9))

        def token_losses(*arguments: Any) -> torch.Tensor:
            losses = original(*arguments)
            return losses * factor if next(calls) + 1 in steps else losses

        if rank in ranks:
            loop.token_losses = token_losses
        return ()

    return patch


def skip_two_steps(rank: int, stop: StopRequest) -> tuple[str, ...]:
    """Make the losses of steps 5 and 6 on rank 1 NaN, and check that a skipped step changes no bit of the state."""
    original = session.Engine.step

    def step(self: Any, learning_rate: float) -> torch.Tensor:
        before = [p.detach().clone() for p in self.module.parameters()] + optimizer_state(self)
        norm = original(self, learning_rate)
        if not self.applied:
            after = [*self.module.parameters(), *optimizer_state(self)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return norm

    session.Engine.step = step
    return scale_losses(math.nan, range(5, 7), (1,))(rank, stop)


def optimizer_state(engine: Any) -> list[torch.Tensor]:
    state = engine._optimizer.state.values()
    return [value.clone() for slots in state for value in slots.values() if torch.is_tensor(value)]


def run_longer(rank: int, stop: StopRequest) -> tuple[str, ...]:
    """Exceed the time limit on rank 1; write the timeouts of the process groups in seconds."""
    stop._started -= 1000 * rank
    original = loop._Training.train_steps

    def run(self: Any) -> loop.Outcome:
        process_groups = {
            "all ranks": torch.distributed.group.WORLD,
            "tensor parallelism": groups.tp_group(),
            "data parallelism": groups.dp_group(),
            "control": self.control_group,
        }
        found = {name: timeout_seconds(group) for name, group in process_groups.items()}
        Path(os.environ["CASE_FOLDER"], f"timeouts_{rank}.json").write_text(json.dumps(found))
        return original(self)

    loop._Training.train_steps = run
    return ()


def timeout_seconds(group: Any) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def another_seed(rank: int, stop: StopRequest) -> tuple[str, ...]:
    return (f"run.seed={1234 + rank}",)


def another_weight(rank: int, stop: StopRequest) -> tuple[str, ...]:
    original = session.Engine.__init__

    def initialise(self: Any, model: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        original(self, model, *arguments, **options)
        with torch.no_grad():
            dict(model.named_parameters())["decoder.layers.1.mlp.linear_fc1.weight"][1, 2] += rank

    session.Engine.__init__ = initialise
    return ()


def own_folder(rank: int, stop: StopRequest) -> tuple[str, ...]:
    """Use one name for a folder on another disk of each node."""
    node = Path(os.environ["CASE_FOLDER"], f"node{rank}")
    node.mkdir()
    os.chdir(node)
    return ("run.dir=run",)


def own_copy(rank: int, stop: StopRequest) -> tuple[str, ...]:
    return (f"data.dir={os.environ['CASE_FOLDER']}/data",)


def record_memory(rank: int, stop: StopRequest) -> tuple[str, ...]:
    """Write the resident memory after every 100 steps, in KiB."""
    original = loop._Training._train_step
    memory: dict[int, int] = {}

    def train_step(self: Any, micro_batches: list[torch.Tensor]) -> None:
        original(self, micro_batches)
        if self.step % 100 == 99:
            status = Path("/proc/self/status").read_text()
            memory[self.step + 1] = int(status.partition("VmRSS:")[2].split()[0])
            Path(os.environ["CASE_FOLDER"], f"memory_{rank}.json").write_text(json.dumps(memory))

    loop._Training._train_step = train_step
    return ()


def shorten(folder: Path, ranks: dict[int, int]) -> None:
    os.truncate(folder / "data" / "train.bin", 100)


def vanish(folder: Path, ranks: dict[int, int]) -> None:
    (folder / "data" / "train.bin").unlink()


def fill(folder: Path, ranks: dict[int, int]) -> None:
    filler = os.open(folder / "filler", os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):
        while True:
            os.write(filler, bytes(1024))
    os.close(filler)


def delete_run(folder: Path, ranks: dict[int, int]) -> None:
    shutil.move(folder / "run" / "checkpoints", folder / "kept")
    shutil.rmtree(folder / "run", ignore_errors=True)


def run_another(folder: Path) -> None:
    """Run a second job on the same run folder to its end."""
    port, os.environ["MASTER_PORT"] = os.environ["MASTER_PORT"], str(free_port())
    another: list[int] = []
    for rank in range(RANKS):
        another.append(os.fork())
        if another[-1] == 0:
            rank_process(rank, folder.name, *map(Path, sys.argv[1:4]), job="_another")
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in another]
    (folder / "another.json").write_text(json.dumps(codes))
    os.environ["MASTER_PORT"] = port


def start_another(folder: Path, ranks: dict[int, int]) -> None:
    """Run a second job, then ask the first one to stop."""
    run_another(folder)
    os.kill(ranks[0], signal.SIGTERM)


def slow_down_saves(rank: int, stop: StopRequest) -> tuple[str, ...]:
    """Make the saves after step 10 take ten minutes, in the first job."""
    write_part, first = save.write_part, not Path(os.environ["CASE_FOLDER"], "signalled").exists()

    def write_slowly(root: Path, snapshot: save.Snapshot) -> Any:
        written = write_part(root, snapshot)
        time.sleep(600 if first and snapshot.step > 10 else 0)
        return written

    save.write_part = write_slowly
    return ()


def signal_twice(folder: Path, ranks: dict[int, int]) -> None:
    """Send two signals to all ranks, as Slurm does, the second during a save; then run the job again."""
    for rank in ranks.values():
        os.kill(rank, signal.SIGUSR1)
    while not list((folder / "run" / "checkpoints").glob(".partial_*/optimizer/*")):
        time.sleep(0.02)
    time.sleep(2.5)  # signals within two seconds count as one request
    (folder / "signalled").write_text(str(time.time()))
    for rank in ranks.values():
        os.kill(rank, signal.SIGUSR1)
    for rank in ranks.values():
        os.waitid(os.P_PID, rank, os.WEXITED | os.WNOWAIT)
    (folder / "ended").write_text(str(time.time()))
    (folder / "left.json").write_text(json.dumps(sorted(os.listdir(folder / "run" / "checkpoints"))))
    run_another(folder)


def make_read_only(folder: Path, ranks: dict[int, int]) -> None:
    checkpoints = folder / "run" / "checkpoints"
    subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)


def send(rank: int, number: signal.Signals) -> Callable[[Path, dict[int, int]], None]:
    return lambda folder, ranks: os.kill(ranks[rank], number)


SPIKE = ("train.spike_window=8", REPLICAS)
MOUNTED = ("full", "full_log", "read_only")
"""Cases whose folder is a small separate disk."""
CASES: dict[str, Case] = {
    "over_time": Case((ENDLESS, "train.max_seconds=500", "train.timeout_seconds=77"), run_longer),
    "signalled": Case((ENDLESS,), event=send(1, signal.SIGUSR1)),
    "nan": Case((REPLICAS, "monitor.profile=true"), skip_two_steps),
    "nan_again_and_again": Case((REPLICAS, "train.max_bad_steps=3"), scale_losses(math.nan, range(13, 99), (1,))),
    "spike_skipped": Case((*SPIKE, "train.skip_spikes=true"), scale_losses(30.0, range(15, 16), (0,))),
    "spike_reported": Case(SPIKE, scale_losses(30.0, range(15, 16), (0,))),
    "another_seed": Case((), another_seed),
    "own_folder": Case((), own_folder),
    "another_weight": Case((REPLICAS,), another_weight),
    "data_shortened": Case((ENDLESS,), own_copy, shorten, after_step=12),
    "data_vanished": Case((ENDLESS,), own_copy, vanish, after_step=12),
    "killed": Case((ENDLESS, "train.timeout_seconds=8"), event=send(1, signal.SIGKILL)),
    "stopped": Case((ENDLESS, "train.timeout_seconds=8"), event=send(0, signal.SIGSTOP), stopped=0),
    "long": Case(
        (
            REPLICAS,
            "train.total_tokens=256128",
            "train.global_batch_size=4",
            "train.micro_batch_size=2",
            "train.eval_interval=200",
            "checkpoint.interval=250",
            "checkpoint.keep_last=2",
        ),
        record_memory,
        timeout=500.0,
    ),
    "signalled_twice": Case((), slow_down_saves, event=signal_twice, after_step=12),
    "run_folder_in_use": Case((ENDLESS,), event=start_another),
    "run_deleted": Case((ENDLESS,), event=delete_run, after_step=12),
    "full": Case((ENDLESS,), event=fill, after_step=12),
    "full_log": Case((ENDLESS, "checkpoint.interval=0"), event=fill, after_step=2),
    "read_only": Case((ENDLESS,), event=make_read_only, after_step=12),
}


def rank_process(rank: int, name: str, config: Path, data: Path, out: Path, job: str = "") -> None:
    case, folder = CASES[name], out / name
    log = os.open(out / f"{name}{job}_{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["CASE_FOLDER"] = str(folder)
    stop = StopRequest.install()
    overrides = (f"run.dir={folder / 'run'}", f"data.dir={data}", *case.overrides, *case.patch(rank, stop))
    code = run_rank(load_config(str(config), list(overrides)), World(rank, RANKS, rank), stop)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(name: str, config: Path, data: Path, out: Path) -> dict[str, Any]:
    """Return exit codes (None: still running) and seconds from the event to the last end."""
    case, folder = CASES[name], out / name
    folder.mkdir()
    if name in MOUNTED:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], check=True)
    shutil.copytree(data, folder / "data")
    os.environ["MASTER_PORT"] = str(free_port())
    ranks = {}
    for rank in range(RANKS):
        ranks[rank] = os.fork()
        if ranks[rank] == 0:
            rank_process(rank, name, config, data, out)
    codes: dict[int, int] = {}
    event, metrics = case.event, folder / "run" / "metrics.jsonl"
    event_time = last = time.time()
    deadline = event_time + case.timeout
    while time.time() < deadline and set(range(RANKS)) - codes.keys() - {case.stopped}:
        saved = case.after_step <= 10 or (folder / "run" / "checkpoints" / "step_00000010").exists()
        if event and saved and metrics.exists() and metrics.read_bytes().count(b"\n") >= case.after_step:
            event(folder, ranks)
            event, event_time = None, time.time()
        for rank in ranks.keys() - codes.keys():
            ended, status = os.waitpid(ranks[rank], os.WNOHANG)
            if ended:
                codes[rank], last = os.waitstatus_to_exitcode(status), time.time()
        time.sleep(0.02)
    for rank in ranks.keys() - codes.keys():
        os.kill(ranks[rank], signal.SIGKILL)
        os.waitpid(ranks[rank], 0)
    if name in MOUNTED:
        # The disk vanishes with this process.
        (folder / "filler").unlink(missing_ok=True)
        shutil.copytree(folder, out / f"{name}_kept")
    return {"codes": [codes.get(rank) for rank in range(RANKS)], "seconds": last - event_time}


if __name__ == "__main__":
    config, data, out = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    for variable in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    results = {name: run(name, config, data, out) for name in sys.argv[4:]}
    (out / "results.json").write_text(json.dumps(results))
