"""Nobody waits for ever for a rank that is gone: two threads per rank, and a message that names the missing one.

``_talk`` beats and reads through the run's store; ``_watch`` reads no more than the clock and what the first one found,
so that it also acts when the store has stopped answering. A rank may be dead, stopped, unreachable (its beat stands
still), hung (it beats, and finishes no step), or have left with a message. Rank 0 watches all, all watch rank 0.
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
from moh_megatron.parallel.failures import lost_a_peer
from moh_megatron.train.fault_tolerance.heartbeat import FailureReport, Heartbeat, Heartbeats, StoreHost
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World

SLOW_SECONDS = 1800.0
"""What start-up, a save or a validation may take at least, whatever a step may."""
START_SECONDS = 120.0
"""What ranks wait at least for the last one to come up: imports from a slow file system differ so much."""
GRACE_SECONDS = 15.0
"""What a collective may wait on top, so that the watchdog, which knows more, speaks first."""
_LONGEST_INTERVAL = 1.0
"""Seconds between two beats, at most: how soon a dead rank can be told from a living one follows from it."""
_STALE_BEATS = 6
"""Beats a rank may miss once the others have lost contact with somebody."""
_LAUNCHER_SECONDS = 3.0
"""How long our launcher may take to say which of its ranks has died."""
_ECHO_SECONDS = 2.0
"""How long a rank listens whether the first one says the same before it says it."""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/", "train/fault_tolerance/watchdog.py")


class Watchdog:
    """One rank's part of the watch; it starts with this object, and does nothing for a run of one rank.

    ``timeout`` in seconds: how long a micro-batch may take, and how long a rank may give no sign of life. ``ended`` is
    told the message and the exit code before a process ends, on the lowest rank that can.
    """

    def __init__(self, world: World, timeout: float, ended: Callable[[str, int], None]) -> None:
        self.timeout, self.slow = timeout, max(timeout, SLOW_SECONDS)
        self._start = max(timeout, START_SECONDS)
        self._world, self._ended = world, ended
        self._launched = PARENT_VARIABLE in os.environ
        self._interval = min(max(timeout / 20, 0.1), _LONGEST_INTERVAL)
        self._host, self._main = socket.gethostname(), threading.main_thread().ident or 0
        self._step, self._phase, self._limit, self._left = 0, "start", self.slow, None
        self._mistake, self._dispersed = False, False
        self._since = time.monotonic()
        self._found: dict[int, Heartbeat] = {}
        self._seen: dict[int, tuple[int, float]] = {}
        self._verdict: FailureReport | None = None
        self._lost_contact = False
        self._last_word = threading.Lock()
        self._stop, self._hurry, self._said = threading.Event(), threading.Event(), threading.Event()
        self._beats: Heartbeats | None = None
        self._contact = time.monotonic()
        self._talker = threading.Thread(target=self._talk, daemon=True, name="heartbeat")
        if world.size > 1:
            self._store = StoreHost.of(world)
            self._talker.start()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def everybody_came(self, asked: Callable[[], bool]) -> bool:
        """Wait until every rank is up; False on all ranks alike where one was ``asked`` to stop before that.

        Where a rank does not come in time, this process ends with a message that names it.
        """
        counted, answer = False, "go" if self._world.size == 1 else ""
        while not answer:
            time.sleep(self._interval / 8)
            try:
                if self._beats is not None:
                    up = self._beats.count("up", 0 if counted else 1)
                    counted = True
                    answer = self._beats.decide("start", "go" if up == self._world.size else "stop" if asked() else "")
                elif asked():
                    answer = "stop"  # there is nobody yet to tell
            except DistError:
                if not self._launched:
                    raise
                answer = "stop"  # our launcher was killed
        if answer == "stop":
            self._dispersed = True
            self._disperse()
        return answer == "go"

    def _disperse(self) -> None:
        """Leave without those who never came; the host of the store, after those who did."""
        beats, self._beats = self._beats, None
        self._stop.set()
        with contextlib.suppress(DistError):
            if beats is not None:
                beats.count("gone", 1)
                deadline = time.monotonic() + 2 * self._interval + 5
                while beats.hosted_here and time.monotonic() < deadline:
                    time.sleep(self._interval)
                    if beats.count("gone", 0) == beats.count("up", 0):
                        break

    def progress(self, step: int) -> None:
        """A micro-batch of the step after ``step`` is through."""
        self._step = step
        self._enter("train", self.timeout)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something that may take longer than a micro-batch."""
        self._enter(name, self.slow)
        yield
        self._enter("train", self.timeout)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Ranks leave the inside together; where one fails, the others' error says which one, and why.

        Raises Fault in place of an error that only says that contact was lost.
        """
        try:
            yield
        except BaseException as error:
            if not self._last_word.acquire(blocking=False):
                time.sleep(self.slow)  # the watchdog has spoken, and is about to end this process
            if self._beats is not None:
                self._fail(error)
            raise
        if self._dispersed:
            return
        self._enter("end", self.timeout)
        if self._beats is not None:
            self._meet(self._beats)
        self._enter("end", self.timeout)  # for what is left to do after this

    def _enter(self, phase: str, limit: float) -> None:
        self._phase, self._limit, self._since = phase, limit, time.monotonic()

    # How a rank leaves.

    def _fail(self, error: BaseException) -> None:
        if not lost_a_peer(error):
            self._mistake = isinstance(error, UserError)
            self._say(_first_line(error))
            if isinstance(error, UserError):
                error.told = self._first_says(_first_line(error))
            self._linger()
            return
        self._lost_contact = True
        self._hurry.set()
        patience = (_STALE_BEATS + 4) * self._interval + 1
        deadline = time.monotonic() + (_LAUNCHER_SECONDS if self._launched else patience)
        while self._verdict is None and time.monotonic() < deadline and not self._stop.is_set():
            time.sleep(self._interval / 4)
            self._verdict = self._verdict or self._silent_store(_STALE_BEATS * self._interval)
        self._say("")
        self._linger()
        if self._verdict is not None:
            self._write_down(self._verdict)
            raise (UserError if self._verdict.mistake else Fault)(self._verdict.message) from error

    def _first_says(self, message: str) -> bool:
        """Whether the first rank, which speaks for all, ends for the same reason."""
        deadline = time.monotonic() + _ECHO_SECONDS
        while self._world.rank != 0 and time.monotonic() < deadline:
            if (first := self._found.get(0)) and first.left is not None:
                return first.left == message
            self._hurry.set()
            time.sleep(self._interval / 8)
        return False

    def _say(self, left: str) -> None:
        """Tell the others why, if the store still listens."""
        self._left = left
        self._hurry.set()
        if self._beats is not None:
            self._said.wait(self._interval + 2)

    def _linger(self) -> None:
        """Let the others read what was said, those that are still starting too, where the store ends with this rank."""
        if self._beats is None or not self._beats.hosted_here:
            return
        everybody, started = self._world.size, time.monotonic()
        with contextlib.suppress(DistError):
            while (waited := time.monotonic() - started) < GRACE_SECONDS:
                missing = self._verdict.missing if self._verdict else []
                up = self._beats.read(range(everybody)).keys() | missing
                # Where all have made one mistake, they listen for this rank to tell it.
                gone = not self._mistake and self._beats.count("gone", 0) == everybody
                if gone or (len(up) == everybody and waited > 2 * self._interval + 0.5):
                    return
                time.sleep(self._interval / 8)

    def _meet(self, beats: Heartbeats) -> None:
        everybody, pause = self._world.size, self._interval / 4
        try:
            beats.count("through", 1)
            while beats.count("through", 0) < everybody:
                time.sleep(pause)
            self._stop.set()
            self._hurry.set()
            self._talker.join(self._interval + 1)
            # The host of the store leaves last.
            beats.count("gone", 1)
            deadline = time.monotonic() + 2 * self._interval + 5
            while beats.hosted_here and time.monotonic() < deadline and beats.count("gone", 0) < everybody:
                time.sleep(pause)
        except DistError:
            if not self._stop.is_set() and not self._launched:
                time.sleep(self.timeout)  # meanwhile the threads say whose fault it is

    # The two threads.

    def _talk(self) -> None:
        count, beats = 0, None
        try:
            beats = self._beats = Heartbeats(self._world, self._store, self._start)
            while not self._stop.is_set():
                count += 1
                beat = self._beat(count)
                beats.publish(beat)
                if beat.left is not None and not self._said.is_set():
                    beats.count("gone", 1)
                    self._said.set()
                self._found = beats.read(self._watched())
                self._verdict = beats.verdict()
                if self._verdict is None and (found := self._judge(self._found)) is not None:
                    self._verdict = beats.declare(found)
                self._contact = time.monotonic()
                self._hurry.wait(self._interval)
                self._hurry.clear()
        except Fault as unreachable:
            self._verdict = FailureReport(str(unreachable), self._store.ranks)
        except DistError:
            if self._launched:
                self._stop.set()  # our launcher was killed, with its store; its ranks save and stop by themselves
            elif not self._stop.is_set() and self._verdict is None and beats is not None:
                self._verdict = self._store.closed()

    def _watch(self) -> None:
        while True:
            time.sleep(self._interval / 2)
            now = time.monotonic()
            if self._verdict is not None and not self._stop.is_set():
                self._end(self._verdict)
            elif not self._stop.is_set() and (silent := self._silent_store(self.timeout)) is not None:
                self._end(silent)
            elif self._beats is None and not self._stop.is_set() and now - self._since > self._start:
                self._end(self._store.absent(self._world.rank, self._start))
            elif now - self._since > self._limit + (0 if self._stop.is_set() else self.slow):  # whatever the others say
                self._end(_hung({self._world.rank: self._beat(0)}))

    def _silent_store(self, patience: float) -> FailureReport | None:
        """The store answers to nobody: its host is stopped, or cut off with its machine."""
        if self._beats is None or time.monotonic() - self._contact <= patience:
            return None
        return self._store.silent(patience)

    def _end(self, verdict: FailureReport) -> None:
        if not self._last_word.acquire(blocking=False):
            return  # the main thread is on its way out with a message
        rank = self._world.rank
        if f"rank {rank} " in verdict.message:
            stack = "".join(traceback.format_stack(self._frame()))
            print(f"rank {rank} stands here:\n{stack}", file=sys.stderr)
        print(f"error: rank {rank} ends, because {verdict.message}", file=sys.stderr, flush=True)
        self._write_down(verdict)
        self._say("")
        self._linger()
        os._exit(verdict.code)

    def _write_down(self, verdict: FailureReport) -> None:
        if self._world.rank == min(set(range(self._world.size)) - set(verdict.missing), default=0):
            self._ended(verdict.message, verdict.code)

    # Who it is.

    def _watched(self) -> range:
        return range(self._world.size if self._world.rank == 0 or self._lost_contact else 1)

    def _judge(self, found: dict[int, Heartbeat]) -> FailureReport | None:
        """A verdict on the beats of the ranks this one watches, if there is reason for one."""
        watched, now = self._watched(), time.monotonic()
        for rank, beat in found.items():
            if rank not in self._seen or self._seen[rank][0] != beat.count:
                self._seen[rank] = (beat.count, now)
        if failed := [rank for rank, beat in found.items() if beat.left]:
            reasons = "; ".join(f"{_name(rank, found[rank])} ended: {found[rank].left}" for rank in failed)
            return FailureReport(reasons, [], all(found[rank].mistake for rank in failed))
        patience = _STALE_BEATS * self._interval if self._lost_contact else self.timeout
        silent = [
            rank
            for rank, (_, changed) in self._seen.items()
            if now - changed > patience and found[rank].left is None and rank != self._world.rank
        ]
        if silent:
            names = ", ".join(_name(rank, found[rank]) for rank in silent)
            return FailureReport(f"{names} is missing: no sign of life for {patience:.0f} s.", silent)
        absent = [rank for rank in watched if rank not in found]
        if absent and now - self._since > self._start:
            return FailureReport(
                f"rank {_list(absent)} did not come up within {self._start:.0f} s of the others.", absent
            )
        # Ranks wait for each other: as long as one of them moves, or may take its time, the rest do not hang.
        return _hung(found) if len(watched) == self._world.size and all(beat.stuck for beat in found.values()) else None

    def _beat(self, count: int) -> Heartbeat:
        place, waiting = "nowhere", False
        if frame := self._frame():
            code = frame.f_code
            place = f"{code.co_name} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno})"
            waiting = any(part in code.co_filename for part in _COLLECTIVES)
        stuck = time.monotonic() - self._since > self._limit
        return Heartbeat(count, self._step, self._phase, self._host, place, waiting, stuck, self._left, self._mistake)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)


def _name(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} ({beat.host}, after step {beat.step}, {beat.phase})"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _hung(beats: dict[int, Heartbeat]) -> FailureReport:
    """Who keeps the others waiting; where the places do not tell, where everybody stands."""
    culprits = {rank: beat for rank, beat in beats.items() if not beat.waiting} or beats
    if len(culprits) < len(beats) or len(beats) == 1:
        names = "; ".join(f"{_name(rank, beat)} hangs in {beat.place}" for rank, beat in culprits.items())
        return FailureReport(f"{names}.", [])
    places: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        places.setdefault(f"{beat.place} after step {beat.step}", []).append(rank)
    few_first = sorted(places.items(), key=lambda item: len(item[1]))
    return FailureReport(
        "nothing moves: " + "; ".join(f"rank {_list(each)} in {place}" for place, each in few_first), []
    )
