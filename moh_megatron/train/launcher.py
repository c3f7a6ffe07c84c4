"""Starts one process per rank on this node, forwards signals, waits for the save, and returns the worst exit code.

torchrun returns 1 for every failure, leaves its workers behind when it receives USR1, and kills them 30 seconds after
TERM. This launcher uses torch.distributed's process launcher underneath, with rules of its own.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from moh_megatron.train.fault_tolerance.signals import EXIT_STOPPED, STOP_SIGNALS, SecondSignal, stopping_message
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, TOKEN_VARIABLE
from moh_megatron.train.preflight import check_suite, preflight

logger = logging.getLogger(__name__)

_HANDLED_BY_TORCH = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_EXPECTED_CODES = (0, 2, EXIT_STOPPED)
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""With these settings glibc keeps freed blocks. By default it returns large ones to the system, and their pages are
faulted in again at every step: a quarter of a ZeRO 1 step on a CPU."""
_GRACE_SECONDS = 15.0
"""How long the other ranks may run after one has failed; normally they end within a second of a peer's death."""
_SECOND_SIGNAL_SECONDS = 3.0
"""How long a rank may take to obey a second signal: one that is still starting has no handlers yet."""
_POLL_SECONDS = 0.1


def worst_code(codes: Sequence[int]) -> int:
    """1 if any rank failed unexpectedly, else 2, else 75, else 0."""
    if any(code not in _EXPECTED_CODES for code in codes):
        return 1
    return next((code for code in (2, EXIT_STOPPED) if code in codes), 0)


def _loopback_store() -> TCPStore:
    """The store of the ranks of one node. By itself torch would listen on all interfaces of the machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, handle = listener.getsockname()[1], listener.detach()
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=handle)


def _loopback_interface() -> dict[str, str]:
    """The variable that has gloo listen on the loopback interface alone, which suffices for the ranks of one node."""
    name = "GLOO_SOCKET_IFNAME"
    if name in os.environ or "lo" not in (interface for _, interface in socket.if_nameindex()):
        return {}
    return {name: "lo"}


def _ignore(reason: str) -> None:
    pass


def run_processes(
    command: Sequence[str],
    ranks: int,
    patience: float = math.inf,
    on_failure: Callable[[str], None] = _ignore,
) -> dict[int, int]:
    """Run one Python process per rank with the arguments ``command``, and return their exit codes when all have ended.

    A negative code is the signal that ended the rank. TERM, INT and USR1 are forwarded to every rank; a rank that does
    not end after a second one is killed. So is a rank that still runs ``patience`` seconds after the first one ended
    in order. ``on_failure`` is called once, with the reason, where ranks fail: the rank that failed first, or what the
    ranks found themselves.
    """
    os.environ.setdefault(TOKEN_VARIABLE, secrets.token_hex(16))
    store = _loopback_store()
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        # The ranks are clients of this process's store, so no other program can take its port in between.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
        # Megatron-core overlaps tensor-parallel communication correctly with one queue only.
        "CUDA_DEVICE_MAX_CONNECTIONS": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "1"),
        **{name: os.environ.get(name, value) for name, value in ALLOCATOR.items()},
        PARENT_VARIABLE: str(os.getpid()),
        **_loopback_interface(),
    }
    processes: dict[int, subprocess.Popen[bytes]] = {}
    early_signals: list[int] = []
    second_signal, kill_time = SecondSignal(), math.inf

    def forward(number: int, frame: FrameType | None = None) -> None:
        nonlocal kill_time
        if not processes:
            early_signals.append(number)
            return
        first = second_signal.first is None
        if second_signal.received():
            kill_time = min(kill_time, time.monotonic() + _SECOND_SIGNAL_SECONDS)
        for process in processes.values():
            if process.poll() is None:
                process.send_signal(number)
        if first:
            logger.info(stopping_message(number))

    # Signals are blocked until each rank has its own handlers: they must not kill a starting rank that could stop in
    # order. Another thread of this process may receive one nevertheless; this thread then runs the handler.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    # Torch's handlers raise an exception at any point of the main thread, and would end a run under nohup when its
    # terminal closes.
    os.environ[_HANDLED_BY_TORCH] = signal.SIGURG.name
    replaced_by_torch = (signal.SIGHUP, signal.SIGQUIT, signal.SIGURG, *STOP_SIGNALS)
    handlers = {number: signal.getsignal(number) for number in replaced_by_torch}
    # Torch needs a folder for logs, and would leave it behind; the ranks write to this process's streams instead.
    with tempfile.TemporaryDirectory() as unused:
        context = start_processes(
            name="pretrain",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(ranks), tuple(command)),
            envs={rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)},
            logs_specs=DefaultLogsSpecs(unused),
        )
    assert isinstance(context, SubprocessContext)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    processes.update({rank: handler.proc for rank, handler in context.subprocess_handlers.items()})
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for number in early_signals:
        forward(number)

    failure_reports, report = FailureReports(store), None
    failure_deadline, patience_deadline = math.inf, math.inf
    while True:
        codes = {rank: process.poll() for rank, process in processes.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        failed = {rank: code for rank, code in ended.items() if code not in _EXPECTED_CODES}
        if failed and report is None:
            # The remaining ranks report why they end, too.
            report = failure_reports.agreed() or failure_reports.declare(
                _failure_report(failed, failure_reports, second_signal=kill_time < math.inf)
            )
            on_failure(report.message.rstrip("."))
        if len(ended) == ranks:
            return ended
        if ended and patience_deadline == math.inf:
            patience_deadline = time.monotonic() + patience
        if failure_deadline == math.inf and any(code not in (0, EXIT_STOPPED) for code in ended.values()):
            failure_deadline = time.monotonic() + _GRACE_SECONDS
        late = time.monotonic() > min(failure_deadline, patience_deadline, kill_time)
        # A rank that is stopped cannot end by itself.
        for rank in codes.keys() - ended.keys() if late else set(report.missing if report else []) - ended.keys():
            os.killpg(processes[rank].pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def _failure_report(failed: dict[int, int], reports: FailureReports, *, second_signal: bool) -> FailureReport:
    """Which ranks caused the failure: those that a signal ended, if any, since they lead the others to an error."""
    if second_signal:
        return FailureReport("a second signal ended the ranks at once.", sorted(failed))
    culprits = sorted(rank for rank, code in failed.items() if code < 0) or sorted(failed)
    return FailureReport(
        ", ".join(_ending(rank, failed[rank], reports.exit_reason(rank)) for rank in culprits) + ".", culprits
    )


def launch_run(command: Sequence[str], config: Config, ranks: int) -> int:
    """Check the configuration, run the processes of this node's ranks, and return the worst rank's exit code.

    Rank 0 writes exit.json; where it could not (it was killed, or another rank failed), this process writes it.
    """
    run_dir = Path(config.run.dir)
    try:
        if ranks < 1:
            raise UserError(f"--nproc-per-node must be at least 1. Got {ranks}.")
        preflight(config, ranks)
        check_suite(config)
    except UserError as error:
        with suppress(OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
        write_exit(run_dir, 2, str(error), last_step(run_dir / "metrics.jsonl"))
        raise
    # Rank 0 takes the lock again. Where another run holds it, no rank needs to start.
    RunLock(run_dir).release()
    (run_dir / "exit.json").unlink(missing_ok=True)
    reasons: list[str] = []
    codes = run_processes(command, ranks, config.train.timeout_seconds + _GRACE_SECONDS, reasons.append)
    code = worst_code(list(codes.values()))
    if code == 1:
        (reason,) = reasons
        logger.error(f"{reason}. The same command goes on from the newest checkpoint in {run_dir}.")
        if not (run_dir / "exit.json").exists():
            write_exit(run_dir, code, reason, last_step(run_dir / "metrics.jsonl"))
    return code


def _ending(rank: int, code: int, exit_reason: str | None) -> str:
    if code >= 0:
        return f"rank {rank} ended: {exit_reason}" if exit_reason else f"rank {rank} ended with exit code {code}"
    # The system raises it where a memory-mapped file shrinks during a read.
    hint = " (a file of data.dir was cut short while it was read)" if -code == signal.SIGBUS else ""
    return f"rank {rank} was ended by {signal.Signals(-code).name}{hint}"
