"""Ends a run whose ranks would wait for one that is gone, with a message that names it. Each rank has two threads.

``_exchange`` publishes and reads heartbeats through the run's store. ``_watch`` looks only at the clock and at what the
other thread found, so that it also acts when the store does not answer. A rank may be dead, stopped or unreachable (its
heartbeat count does not change), hang (its count grows, but it finishes no step), or have ended with a message. Rank 0
watches all ranks, and all ranks watch rank 0.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from torch.distributed import DistError

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.printable import printable
from moh_megatron.parallel.failures import lost_a_peer
from moh_megatron.train.fault_tolerance.heartbeat import FailureReport, Heartbeat, Heartbeats, StoreHost
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World

SLOW_SECONDS = 1800.0
"""The least time limit of start-up, a save or a validation."""
START_SECONDS = 120.0
"""The least time that ranks wait for the last one to come up: imports from a slow file system differ so much."""
GRACE_SECONDS = 15.0
"""How much longer a collective may wait, so that the watchdog, which knows more, reports first."""
_LONGEST_INTERVAL = 1.0
"""Seconds between two heartbeats at most; they bound how soon a dead rank can be recognised."""
_STALE_HEARTBEATS = 6
"""Heartbeats that a rank may miss once the others have lost contact with some rank."""
_LAUNCHER_SECONDS = 3.0
"""How long our launcher may take to report which of its ranks has died."""
_ECHO_SECONDS = 2.0
"""How long a rank waits for rank 0 to report the same error, before it reports it itself."""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/", "train/fault_tolerance/watchdog.py")


class Watchdog:
    """Watches the other ranks for one rank, from construction on; does nothing in a run of one rank.

    Args:
        timeout: seconds that a micro-batch may take, and that a rank may go without a new heartbeat.
        on_failure: called with the message and the exit code before a process ends, on the lowest rank that can.
    """

    def __init__(self, world: World, timeout: float, on_failure: Callable[[str, int], None]) -> None:
        self.timeout, self.slow = timeout, max(timeout, SLOW_SECONDS)
        self._start_timeout = max(timeout, START_SECONDS)
        self._world, self._on_failure = world, on_failure
        self._launched = PARENT_VARIABLE in os.environ
        self._interval = min(max(timeout / 20, 0.1), _LONGEST_INTERVAL)
        self._host, self._main_thread = socket.gethostname(), threading.main_thread().ident or 0
        self._step, self._phase, self._limit, self._exit_reason = 0, "start", self.slow, None
        self._user_error, self._stopped_at_start = False, False
        self._since = time.monotonic()
        self._found: dict[int, Heartbeat] = {}
        self._last_change: dict[int, tuple[int, float]] = {}
        self._report: FailureReport | None = None
        self._own_report: FailureReport | None = None
        """What this rank ends with by its own judgement; the others and the launcher hear it if the store answers."""
        self._lost_contact = False
        self._reporting = threading.Lock()
        """Held by the thread that shows the error of this rank."""
        self._finished, self._wake, self._published = threading.Event(), threading.Event(), threading.Event()
        self._heartbeats: Heartbeats | None = None
        self._contact = time.monotonic()
        self._exchanger = threading.Thread(target=self._exchange, daemon=True, name="heartbeat")
        if world.size > 1:
            self._store_host = StoreHost.from_environment(world)
            self._exchanger.start()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def all_ranks_up(self, stop_requested: Callable[[], bool]) -> bool:
        """Wait until every rank is up; return False on all ranks if one of them is asked to stop before that.

        Where a rank does not come up in time, this process ends with a message that names it.
        """
        counted, answer = False, "go" if self._world.size == 1 else ""
        while not answer:
            time.sleep(self._interval / 8)
            try:
                if self._heartbeats is not None:
                    up = self._heartbeats.count("up", 0 if counted else 1)
                    counted = True
                    proposal = "go" if up == self._world.size else "stop" if stop_requested() else ""
                    answer = self._heartbeats.decide("start", proposal)
                elif stop_requested():
                    answer = "stop"  # No other rank can be informed yet.
            except DistError:
                if not self._launched:
                    raise
                answer = "stop"  # Our launcher was killed.
        if answer == "stop":
            self._stopped_at_start = True
            self._leave_at_start()
        return answer == "go"

    def _leave_at_start(self) -> None:
        """Leave without the ranks that did not come up; the host of the store leaves after those that did."""
        heartbeats, self._heartbeats = self._heartbeats, None
        self._finished.set()
        with contextlib.suppress(DistError):
            if heartbeats is not None:
                heartbeats.count("gone", 1)
                deadline = time.monotonic() + 2 * self._interval + 5
                while heartbeats.hosted_by_self and time.monotonic() < deadline:
                    time.sleep(self._interval)
                    if heartbeats.count("gone", 0) == heartbeats.count("up", 0):
                        break

    def progress(self, step: int) -> None:
        """Record that a micro-batch of the step after ``step`` is finished."""
        self._step = step
        self._enter("train", self.timeout)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Allow the block to take longer than a micro-batch."""
        self._enter(name, self.slow)
        yield
        self._enter("train", self.timeout)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Let the ranks leave the block together; where one fails, the others' error says which one, and why.

        Raises Fault in place of an error that only says that contact was lost.
        """
        try:
            yield
        except BaseException as error:
            if not self._reporting.acquire(blocking=False):
                time.sleep(self.slow)  # The watchdog thread has reported, and is about to end this process.
            if self._heartbeats is not None:
                self._fail(error)
            raise
        if self._stopped_at_start:
            return
        self._enter("end", self.timeout)
        if self._heartbeats is not None:
            self._leave_together(self._heartbeats)
        self._enter("end", self.timeout)  # The time limit of what is left to do after the block.

    def _enter(self, phase: str, limit: float) -> None:
        self._phase, self._limit, self._since = phase, limit, time.monotonic()

    # How a rank ends.

    def _fail(self, error: BaseException) -> None:
        if not lost_a_peer(error):
            self._user_error = isinstance(error, UserError)
            self._publish_exit(_first_line(error))
            if isinstance(error, UserError):
                error.reported = self._rank_0_reports(_first_line(error))
            self._wait_for_readers()
            return
        self._lost_contact = True
        self._wake.set()
        seconds = (_STALE_HEARTBEATS + 4) * self._interval + 1
        deadline = time.monotonic() + (_LAUNCHER_SECONDS if self._launched else seconds)
        while self._report is None and time.monotonic() < deadline and not self._finished.is_set():
            time.sleep(self._interval / 4)
            self._own_report = self._silent_store(_STALE_HEARTBEATS * self._interval)
            self._report = self._report or self._own_report
        self._publish_exit("")
        self._wait_for_readers()
        if self._report is not None:
            self._record(self._report)
            raise (UserError if self._report.user_error else Fault)(self._report.message) from error

    def _rank_0_reports(self, message: str) -> bool:
        """Return whether rank 0, which reports for all ranks, ends for the same reason."""
        deadline = time.monotonic() + _ECHO_SECONDS
        while self._world.rank != 0 and time.monotonic() < deadline:
            if (first := self._found.get(0)) and first.exit_reason is not None:
                return first.exit_reason == message
            self._wake.set()
            time.sleep(self._interval / 8)
        return False

    def _publish_exit(self, reason: str) -> None:
        """Publish why this rank ends, if the store still answers."""
        self._exit_reason = reason
        self._wake.set()
        if self._heartbeats is not None:
            self._published.wait(self._interval + 2)

    def _wait_for_readers(self) -> None:
        """Where the store ends with this rank, let the others read what was published, also those that still start."""
        if self._heartbeats is None or not self._heartbeats.hosted_by_self:
            return
        size, started = self._world.size, time.monotonic()
        with contextlib.suppress(DistError):
            while (waited := time.monotonic() - started) < GRACE_SECONDS:
                missing = self._report.missing if self._report else []
                up = self._heartbeats.read(range(size)).keys() | missing
                # Where all ranks have found the same user error, they wait for this rank to report it.
                gone = not self._user_error and self._heartbeats.count("gone", 0) == size
                if gone or (len(up) == size and waited > 2 * self._interval + 0.5):
                    return
                time.sleep(self._interval / 8)

    def _leave_together(self, heartbeats: Heartbeats) -> None:
        size, pause = self._world.size, self._interval / 4
        try:
            heartbeats.count("finished", 1)
            while heartbeats.count("finished", 0) < size:
                time.sleep(pause)
            self._finished.set()
            self._wake.set()
            self._exchanger.join(self._interval + 1)
            # The host of the store leaves last.
            heartbeats.count("gone", 1)
            deadline = time.monotonic() + 2 * self._interval + 5
            while heartbeats.hosted_by_self and time.monotonic() < deadline and heartbeats.count("gone", 0) < size:
                time.sleep(pause)
        except DistError:
            if not self._finished.is_set() and not self._launched:
                time.sleep(self.timeout)  # Meanwhile the threads report which rank failed.

    # The two threads.

    def _exchange(self) -> None:
        count, heartbeats = 0, None
        try:
            heartbeats = self._heartbeats = Heartbeats(self._world, self._store_host, self._start_timeout)
            while not self._finished.is_set():
                count += 1
                heartbeat = self._heartbeat(count)
                heartbeats.publish(heartbeat)
                self._found = heartbeats.read(self._watched())
                self._report = heartbeats.agreed()
                if self._report is None and (found := self._own_report or self._judge(self._found)) is not None:
                    self._report = heartbeats.declare(found)
                if heartbeat.exit_reason is not None and not self._published.is_set():
                    heartbeats.count("gone", 1)
                    self._published.set()
                self._contact = time.monotonic()
                self._wake.wait(self._interval)
                self._wake.clear()
        except Fault as unreachable:
            self._report = FailureReport(str(unreachable), self._store_host.ranks)
        except DistError:
            if self._launched:
                self._finished.set()  # Our launcher was killed, with its store; its ranks save and stop by themselves.
            elif not self._finished.is_set() and self._report is None and heartbeats is not None:
                self._report = self._store_host.closed()

    def _watch(self) -> None:
        while True:
            time.sleep(self._interval / 2)
            now = time.monotonic()
            if self._report is not None and not self._finished.is_set():
                self._end(self._report)
            elif not self._finished.is_set() and (silent := self._silent_store(self.timeout)) is not None:
                self._end(silent)
            elif self._heartbeats is None and not self._finished.is_set() and now - self._since > self._start_timeout:
                self._end(self._store_host.absent(self._world.rank, self._start_timeout))
            # A time limit of this rank that counts whatever the others report.
            elif now - self._since > self._limit + (0 if self._finished.is_set() else self.slow):
                self._end(_hanging({self._world.rank: self._heartbeat(0)}))

    def _silent_store(self, seconds: float) -> FailureReport | None:
        """Return a report if the store has not answered this rank for so long."""
        if self._heartbeats is None or time.monotonic() - self._contact <= seconds:
            return None
        return self._store_host.silent(seconds)

    def _end(self, report: FailureReport) -> None:
        if not self._reporting.acquire(blocking=False):
            return  # The main thread is ending with a message.
        rank, self._own_report = self._world.rank, report
        # Not through logging: the main thread may hang while it holds a handler's lock.
        if f"rank {rank} " in report.message:
            stack = "".join(traceback.format_stack(self._frame()))
            print(printable(f"stack of rank {rank}'s main thread:\n{stack}"), file=sys.stderr)
        print(printable(f"error: rank {rank} ends, because {report.message}"), file=sys.stderr, flush=True)
        self._record(report)
        self._publish_exit("")
        self._wait_for_readers()
        os._exit(report.code)

    def _record(self, report: FailureReport) -> None:
        if self._world.rank == min(set(range(self._world.size)) - set(report.missing), default=0):
            self._on_failure(report.message, report.code)

    # Which rank failed.

    def _watched(self) -> range:
        return range(self._world.size if self._world.rank == 0 or self._lost_contact else 1)

    def _judge(self, found: dict[int, Heartbeat]) -> FailureReport | None:
        """Return a report on the ranks that this one watches, if their heartbeats give a reason for one."""
        watched, now = self._watched(), time.monotonic()
        for rank, heartbeat in found.items():
            if rank not in self._last_change or self._last_change[rank][0] != heartbeat.count:
                self._last_change[rank] = (heartbeat.count, now)
        if failed := [rank for rank, heartbeat in found.items() if heartbeat.exit_reason]:
            reasons = "; ".join(f"{_name(rank, found[rank])} ended: {found[rank].exit_reason}" for rank in failed)
            return FailureReport(reasons, [], all(found[rank].user_error for rank in failed))
        limit = _STALE_HEARTBEATS * self._interval if self._lost_contact else self.timeout
        silent = [
            rank
            for rank, (_, changed) in self._last_change.items()
            if now - changed > limit and found[rank].exit_reason is None and rank != self._world.rank
        ]
        if silent:
            names = ", ".join(_name(rank, found[rank]) for rank in silent)
            return FailureReport(f"{names} is missing: no heartbeat for {limit:.0f} s.", silent)
        absent = [rank for rank in watched if rank not in found]
        if absent and now - self._since > self._start_timeout:
            return FailureReport(
                f"rank {_list(absent)} did not come up within {self._start_timeout:.0f} s of the others.", absent
            )
        # Ranks wait for each other: while one of them moves, or is within its time limit, the others do not hang.
        all_stuck = len(watched) == self._world.size and all(heartbeat.stuck for heartbeat in found.values())
        return _hanging(found) if all_stuck else None

    def _heartbeat(self, count: int) -> Heartbeat:
        position, waiting = "nowhere", False
        if frame := self._frame():
            code = frame.f_code
            position = f"{code.co_name} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno})"
            waiting = any(part in code.co_filename for part in _COLLECTIVES)
        return Heartbeat(
            count,
            self._step,
            self._phase,
            self._host,
            position,
            waiting,
            stuck=time.monotonic() - self._since > self._limit,
            exit_reason=self._exit_reason,
            user_error=self._user_error,
        )

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main_thread)


def _name(rank: int, heartbeat: Heartbeat) -> str:
    return f"rank {rank} ({heartbeat.host}, after step {heartbeat.step}, {heartbeat.phase})"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _hanging(heartbeats: dict[int, Heartbeat]) -> FailureReport:
    """Report the ranks that keep the others waiting; where that is not clear, the position of every rank."""
    culprits = {rank: heartbeat for rank, heartbeat in heartbeats.items() if not heartbeat.waiting} or heartbeats
    if len(culprits) < len(heartbeats) or len(heartbeats) == 1:
        names = "; ".join(
            f"{_name(rank, heartbeat)} hangs in {heartbeat.position}" for rank, heartbeat in culprits.items()
        )
        return FailureReport(f"{names}.", [])
    positions: dict[str, list[int]] = {}
    for rank, heartbeat in heartbeats.items():
        positions.setdefault(f"{heartbeat.position} after step {heartbeat.step}", []).append(rank)
    fewest_first = sorted(positions.items(), key=lambda item: len(item[1]))
    return FailureReport(
        "no rank makes progress: "
        + "; ".join(f"rank {_list(ranks)} in {position}" for position, ranks in fewest_first),
        [],
    )
