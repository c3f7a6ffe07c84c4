"""Runs small worlds of forked processes in which a rank is lost; saves what the others report, and when they end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.train.fault_tolerance import watchdog
from moh_megatron.train.fault_tolerance.watchdog import Watchdog
from moh_megatron.train.fault_tolerance.world import World

RANKS = 3
STEPS = 5
TIMEOUT_SECONDS = START_SECONDS = 8.0
DEADLINE_SECONDS = 45.0
BATCH_SIZE = 6


def nothing(rank: int) -> None:
    pass


def on_rank(number: int, action: Callable[[], Any]) -> Callable[[int], None]:
    return lambda rank: action() if rank == number else None


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang() -> None:
    time.sleep(DEADLINE_SECONDS)


def fail() -> None:
    raise Fault("the disk of this rank is full")


def make_user_error() -> None:
    raise UserError("no such architecture")


def stop_the_host() -> None:
    os.kill(int(os.environ["STORE_PROCESS"]), signal.SIGSTOP)


def slow() -> None:
    time.sleep(1.5 * TIMEOUT_SECONDS)


# What a rank does before, during and after training.
CASES: dict[str, tuple[Callable[[int], None], Callable[[int], None], Callable[[int], None]]] = {
    "finished": (nothing, nothing, nothing),
    "slow_start_save_and_end": (on_rank(1, slow), on_rank(1, slow), nothing),
    "killed": (nothing, on_rank(1, kill), nothing),
    "killed_first": (nothing, on_rank(0, kill), nothing),
    "stopped": (nothing, on_rank(2, stop), nothing),
    "stopped_first": (nothing, on_rank(0, stop), nothing),
    "hung": (nothing, on_rank(1, hang), nothing),
    "failed": (nothing, on_rank(1, fail), nothing),
    "failed_first": (nothing, on_rank(0, fail), nothing),
    "failed_at_start": (on_rank(2, fail), nothing, nothing),
    "hung_after_the_others_finished": (nothing, nothing, on_rank(1, hang)),
    "stopped_after_the_others_finished": (nothing, nothing, on_rank(2, stop)),
    "never_came": (nothing, nothing, nothing),
    "first_never_came": (nothing, nothing, nothing),
    "stop_requested_before_all_came_up": (nothing, nothing, nothing),
    "user_error_of_one": (on_rank(1, make_user_error), nothing, nothing),
    "user_error_of_all": (lambda rank: make_user_error(), nothing, nothing),
    "launcher_stopped": (nothing, on_rank(1, stop_the_host), nothing),
    "agent_stopped": (nothing, on_rank(1, stop_the_host), nothing),
}


STOPPED = {"stopped": 2, "stopped_first": 0, "stopped_after_the_others_finished": 2}
"""The rank that still exists at the end: only the system can end a stopped process."""


ABSENT = {"never_came": 1, "first_never_came": 0, "stop_requested_before_all_came_up": 1}
"""The rank that dies before its first heartbeat."""
HOSTED = ("launcher_stopped", "agent_stopped")
"""Cases whose store is in a separate process."""


def train(rank: int, case: str, folder: Path) -> int:
    before, during, after = CASES[case]
    world = World(rank, RANKS, rank)

    def write_reason(reason: str, code: int) -> None:
        (folder / "exit").write_text(reason)

    (folder / f"event_{rank}").write_text(str(time.time()))
    if rank == ABSENT.get(case):
        kill()
    started = time.monotonic()
    watch = Watchdog(world, TIMEOUT_SECONDS, write_reason)
    with watch.watching():
        if not watch.all_ranks_up(lambda: "stop_requested" in case and rank == 2 and time.monotonic() - started > 2):
            return 75
        before(rank)
        dist.init_process_group("gloo", rank=rank, world_size=RANKS)
        for step in range(STEPS):
            if step == 3:
                (folder / f"event_{rank}").write_text(str(time.time()))
                with watch.phase("save") if "save" in case else contextlib.nullcontext():
                    during(rank)
                dist.barrier()
            dist.all_reduce(torch.ones(1))
            watch.progress(step + 1)
        (folder / f"event_{rank}").write_text(str(time.time()))
        after(rank)
    return 0


def process(rank: int, case: str, folder: Path) -> None:
    log = os.open(folder / f"log_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        code = train(rank, case, folder)
    except BaseException as error:
        code = 2 if isinstance(error, UserError) else 1
        if not getattr(error, "reported", False):
            print(f"error: {error}", flush=True)
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(case: str, root: Path) -> dict[int, int]:
    """Start the ranks of a case with a separate store, as without a launcher; return their process ids."""
    folder = root / case
    folder.mkdir()
    os.environ["MASTER_PORT"] = str(free_port())
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "MOH_LAUNCHER_PID"):
        os.environ.pop(name, None)
    if case in HOSTED:
        host_store(case)
    ranks = {}
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            process(rank, case, folder)
        ranks[rank] = child
    return ranks


def host_store(case: str) -> None:
    """Start a process that hosts the store and ends with this one; the environment names it to the ranks."""
    inner, outer = os.pipe()
    host = os.fork()
    if host == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(2 * DEADLINE_SECONDS))
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
        os.write(outer, b"up")
        while store:
            time.sleep(1)
    os.read(inner, 1)
    HOSTS.append(host)
    os.environ |= {"STORE_PROCESS": str(host), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if case == "launcher_stopped":
        os.environ["MOH_LAUNCHER_PID"] = str(host)


HOSTS: list[int] = []


def batched(cases: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(cases)
    while batch := list(islice(remaining, BATCH_SIZE)):
        yield batch


def results(cases: list[str], root: Path) -> dict[str, dict[str, Any]]:
    """Return exit codes (None: still running), seconds from the event to the last end, and output for each case."""
    started = {case: start(case, root) for case in cases}
    running = {(case, rank): pid for case, ranks in started.items() for rank, pid in ranks.items()}
    codes: dict[tuple[str, int], int] = {}
    ends: dict[str, float] = {}
    deadline = time.time() + DEADLINE_SECONDS
    while time.time() < deadline and any(rank != STOPPED.get(case) for case, rank in running):
        for (case, rank), pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[case, rank], ends[case] = os.waitstatus_to_exitcode(status), time.time()
                del running[case, rank]
        time.sleep(0.05)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for host in HOSTS:
        os.kill(host, signal.SIGKILL)
        os.waitpid(host, 0)
    HOSTS.clear()
    found = {}
    for case in cases:
        events = [float(file.read_text()) for file in (root / case).glob("event_*")]
        exit_file = root / case / "exit"
        found[case] = {
            "codes": [codes.get((case, rank)) for rank in range(RANKS)],
            "seconds": ends.get(case, time.time()) - max(events, default=0.0),
            "logs": [(root / case / f"log_{rank}").read_text() for rank in range(RANKS)],
            "exit": exit_file.read_text() if exit_file.exists() else None,
        }
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    root = path.with_suffix("")
    root.mkdir()
    watchdog.START_SECONDS = START_SECONDS
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.save({case: found for batch in batched(CASES) for case, found in results(batch, root).items()}, path)
