"""Start one process a rank on this node, pass signals on, wait for the save, and return the worst rank's code.

torchrun returns 1 for every failure, dies of USR1 leaving its workers behind, and kills them 30 seconds after TERM;
this uses torch.distributed's process launcher underneath, but supervises by these rules instead.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.monitor.records import last_step, write_exit
from moh_megatron.train.fault_tolerance.heartbeat import FailureReport, FailureReports
from moh_megatron.train.fault_tolerance.run_lock import RunLock
from moh_megatron.train.fault_tolerance.signals import EXIT_STOPPED, STOP_SIGNALS, SecondSignal
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE
from moh_megatron.train.preflight import check_suite, preflight

logger = logging.getLogger(__name__)

_HANDLED_BY_TORCH = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_EXPECTED_CODES = (0, 2, EXIT_STOPPED)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""glibc keeps freed blocks. By default it hands large ones back, and their pages are faulted in again at every step:
a quarter of a ZeRO 1 step on a CPU."""
_GRACE_SECONDS = 15.0
"""How long the other ranks may run on after one has failed; a peer's death normally ends them within a second."""
_INSISTED_SECONDS = 3.0
"""How long a rank may take to obey a second signal: one that is still starting has not got its handlers."""
_POLL_SECONDS = 0.1


def worst_code(codes: Sequence[int]) -> int:
    """1 if any rank failed in an unforeseen way, else 2, else 75, else 0."""
    if any(code not in _EXPECTED_CODES for code in codes):
        return 1
    return next((code for code in (2, EXIT_STOPPED) if code in codes), 0)


def _ignore(reason: str) -> None:
    pass


def launch(
    command: Sequence[str],
    ranks: int,
    patience: float = math.inf,
    failed: Callable[[str], None] = _ignore,
) -> dict[int, int]:
    """Run Python with the arguments ``command`` once for each rank; returns their exit codes when all have ended.

    A negative code is the signal that ended the rank. TERM, INT and USR1 are forwarded to every rank; what outlives a
    second one is killed. A rank that still runs ``patience`` seconds after the first one has ended well hangs, and is
    killed. ``failed`` is told, once, why ranks end that should not have: who was first, or what the ranks found.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # The ranks are clients of this process's store: no port is picked that another program could take meanwhile.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
        # Megatron-core overlaps tensor-parallel communication correctly only with one queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        **{name: os.environ.get(name, value) for name, value in ALLOCATOR.items()},
        PARENT_VARIABLE: str(os.getpid()),
    }
    processes: dict[int, subprocess.Popen[bytes]] = {}
    early: list[int] = []
    second_signal, insisted = SecondSignal(), math.inf

    def forward(number: int, frame: FrameType | None = None) -> None:
        nonlocal insisted
        if not processes:
            early.append(number)
            return
        if second_signal.received():
            insisted = min(insisted, time.monotonic() + _INSISTED_SECONDS)
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(number)

    # Held back until each rank has its own handlers: a signal during start-up must not kill what could stop in order.
    # Another thread of this process may take it all the same, and this one then runs the handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    # Torch's handlers raise wherever the main thread stands, and would end a run under nohup when its terminal closes.
    os.environ[_HANDLED_BY_TORCH] = signal.SIGURG.name
    torchs = (signal.SIGHUP, signal.SIGQUIT, signal.SIGURG, *STOP_SIGNALS)
    before = {number: signal.getsignal(number) for number in torchs}
    # Torch wants a folder of logs, and would leave it behind; the ranks write to this process's streams instead.
    with tempfile.TemporaryDirectory() as unused:
        context = start_processes(
            name="pretrain",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(ranks), tuple(command)),
            envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)},
            logs_specs=DefaultLogsSpecs(unused),
        )
    assert isinstance(context, SubprocessContext)
    for number, handler in before.items():
        signal.signal(number, handler)
    processes.update({rank: handler.proc for rank, handler in context.subprocess_handlers.items()})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in early:
        forward(number)

    verdicts, verdict = FailureReports(store), None
    deadline, waited = math.inf, math.inf
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        bad = {rank: code for rank, code in ended.items() if code not in _EXPECTED_CODES}
        if bad and verdict is None:
            # The ranks that are left say why they end, too.
            verdict = verdicts.agreed() or verdicts.declare(_finding(bad, verdicts, insisted < math.inf))
            failed(verdict.message.rstrip("."))
        if len(ended) == ranks:
            return ended
        if ended and waited == math.inf:
            waited = time.monotonic() + patience
        if deadline == math.inf and any(code not in (0, EXIT_STOPPED) for code in ended.values()):
            deadline = time.monotonic() + _GRACE_SECONDS
        late = time.monotonic() > min(deadline, waited, insisted)
        # What is stopped can be ended by nobody else.
        for rank in codes.keys() - ended.keys() if late else set(verdict.missing if verdict else []) - ended.keys():
            os.killpg(processes[rank].pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _finding(bad: dict[int, int], verdicts: FailureReports, insisted: bool) -> FailureReport:
    """Whose fault it is that ranks ended so: those that a signal ended say nothing, and lead the others to an error."""
    if insisted:
        return FailureReport("a second signal ended the ranks at once.", sorted(bad))
    culprits = sorted(rank for rank, code in bad.items() if code < 0) or sorted(bad)
    return FailureReport(
        ", ".join(_how(rank, bad[rank], verdicts.exit_reason(rank)) for rank in culprits) + ".", culprits
    )


def supervise(command: Sequence[str], config: Config, ranks: int) -> int:
    """Check the configuration for so many ranks, run them as ``launch`` does, and return the worst rank's code.

    exit.json is written by rank 0; where it could not (it was killed, or another rank failed), here.
    """
    run_dir = Path(config.run.dir)
    try:
        if ranks < 1:
            raise UserError(f"--nproc-per-node must be at least 1. Got {ranks}.")
        preflight(config, ranks)
        check_suite(config)
    except UserError as error:
        write_exit(run_dir, 2, str(error), last_step(run_dir / "metrics.jsonl"))
        raise
    RunLock(run_dir).release()  # rank 0 takes it; who would be refused then need not start
    (run_dir / "exit.json").unlink(missing_ok=True)
    reasons: list[str] = []
    codes = launch(command, ranks, config.train.timeout_seconds + _GRACE_SECONDS, reasons.append)
    code = worst_code(list(codes.values()))
    if code == 1:
        (reason,) = reasons
        logger.error(f"{reason}. The same command goes on from the newest checkpoint in {run_dir}.")
        if not (run_dir / "exit.json").exists():
            write_exit(run_dir, code, reason, last_step(run_dir / "metrics.jsonl"))
    return code


def _how(rank: int, code: int, last_words: str | None) -> str:
    if code >= 0:
        return f"rank {rank} ended: {last_words}" if last_words else f"rank {rank} ended with exit code {code}"
    # A memory-mapped file that shrinks in the middle of a read cannot be caught.
    hint = " (a file of data.dir was cut short while it was read)" if -code == signal.SIGBUS else ""
    return f"rank {rank} was ended by {signal.Signals(-code).name}{hint}"
