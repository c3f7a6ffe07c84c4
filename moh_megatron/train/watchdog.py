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

from moh_megatron.config.errors import Fault
from moh_megatron.parallel.failures import lost_a_peer
from moh_megatron.train.heartbeat import Beat, Heartbeats, Verdict
from moh_megatron.train.world import PARENT_VARIABLE, World

SLOW_SECONDS = 1800.0
"""What start-up, a save or a validation may take at least, whatever a step may."""
GRACE_SECONDS = 15.0
"""What a collective may wait on top, so that the watchdog, which knows more, speaks first."""
_STALE_BEATS = 6
"""Beats a rank may miss once the others have lost contact with somebody."""
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "torch/autograd/", "train/watchdog.py")


class Watchdog:
    """One rank's part of the watch; it starts with this object, and does nothing for a run of one rank.

    ``timeout`` in seconds: how long a micro-batch may take, and how long a rank may give no sign of life. ``ended`` is
    told the message before a process ends with exit code 1, on the lowest rank that can.
    """

    def __init__(self, world: World, timeout: float, ended: Callable[[str], None]) -> None:
        self.timeout, self.slow = timeout, max(timeout, SLOW_SECONDS)
        self._world, self._ended = world, ended
        self._launched = PARENT_VARIABLE in os.environ
        self._interval = min(max(timeout / 20, 0.1), 5.0)
        self._host, self._main = socket.gethostname(), threading.main_thread().ident or 0
        self._step, self._phase, self._limit, self._left = 0, "start", self.slow, None
        self._since = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._verdict: Verdict | None = None
        self._lost_contact = False
        self._last_word = threading.Lock()
        self._stop, self._hurry, self._said = threading.Event(), threading.Event(), threading.Event()
        self._beats = Heartbeats(world) if world.size > 1 else None
        self._contact = time.monotonic()
        if self._beats is not None:
            self._talker = threading.Thread(target=self._talk, args=(self._beats,), daemon=True, name="heartbeat")
            self._talker.start()
            threading.Thread(target=self._watch, args=(self._beats,), daemon=True, name="watchdog").start()

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
            # Of our launcher's ranks, the launcher sees who died.
            if self._beats is not None and not self._launched:
                self._fail(error)
            raise
        self._enter("end", self.timeout)
        if self._beats is not None:
            self._meet(self._beats)
        self._enter("end", self.timeout)  # for what is left to do after this

    def _enter(self, phase: str, limit: float) -> None:
        self._phase, self._limit, self._since = phase, limit, time.monotonic()

    # How a rank leaves.

    def _fail(self, error: BaseException) -> None:
        if not lost_a_peer(error):
            self._say(str(error).split("\n")[0] or type(error).__name__)
            self._linger()
            return
        self._lost_contact = True
        deadline = time.monotonic() + (_STALE_BEATS + 4) * self._interval + 1
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(self._interval / 4)
            self._verdict = self._verdict or self._silent_store(_STALE_BEATS * self._interval)
        self._say("")
        self._linger()
        if self._verdict is not None:
            self._write_down(self._verdict)
            raise Fault(self._verdict.message) from error

    def _say(self, left: str) -> None:
        """Tell the others why, if the store still listens."""
        self._left = left
        self._hurry.set()
        self._said.wait(self._interval + 2)

    def _linger(self) -> None:
        """Let the others read what was said, those that are still starting too, where the store ends with this rank."""
        if self._world.rank != 0 or self._beats is None:
            return
        everybody, started = self._world.size, time.monotonic()
        with contextlib.suppress(DistError):
            while (waited := time.monotonic() - started) < GRACE_SECONDS:
                up = len(self._beats.read(range(everybody))) == everybody
                if self._beats.count("gone", 0) == everybody or (up and waited > 2 * self._interval + 0.5):
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
            while self._world.rank == 0 and time.monotonic() < deadline and beats.count("gone", 0) < everybody:
                time.sleep(pause)
        except DistError:
            if not self._stop.is_set() and not self._launched:
                time.sleep(self.timeout)  # meanwhile the threads say whose fault it is

    # The two threads.

    def _talk(self, beats: Heartbeats) -> None:
        count = 0
        try:
            while not self._stop.is_set():
                count += 1
                beat = self._beat(count)
                beats.publish(beat)
                if beat.left is not None and not self._said.is_set():
                    beats.count("gone", 1)
                    self._said.set()
                self._verdict = beats.verdict()
                if self._verdict is None and (found := self._judge(beats)) is not None:
                    self._verdict = beats.declare(found)
                self._contact = time.monotonic()
                self._hurry.wait(self._interval)
                self._hurry.clear()
        except DistError:
            if self._launched:
                self._stop.set()  # our launcher was killed, with its store; its ranks save and stop by themselves
            elif not self._stop.is_set() and self._verdict is None:
                self._verdict = Verdict(f"rank 0 is gone: the store at {beats.address} has closed.", [0])

    def _watch(self, beats: Heartbeats) -> None:
        while True:
            time.sleep(self._interval / 2)
            now = time.monotonic()
            if self._verdict is not None and not self._stop.is_set():
                self._end(self._verdict)
            elif not self._stop.is_set() and (silent := self._silent_store(self.timeout)) is not None:
                self._end(silent)
            elif now - self._since > self._limit + (0 if self._stop.is_set() else self.slow):  # whatever the others say
                self._end(_hung({self._world.rank: self._beat(0)}))

    def _silent_store(self, patience: float) -> Verdict | None:
        """The store answers to nobody: who hosts it, or stands next to it, is rank 0."""
        if self._beats is None or time.monotonic() - self._contact <= patience:
            return None
        silence = f"the store at {self._beats.address} has not answered for {patience:.0f} s"
        return Verdict(f"rank 0 is missing: {silence}. Stopped, or its machine is gone.", [0])

    def _end(self, verdict: Verdict) -> None:
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
        os._exit(1)

    def _write_down(self, verdict: Verdict) -> None:
        if self._world.rank == min(set(range(self._world.size)) - set(verdict.missing), default=0):
            self._ended(verdict.message)

    # Who it is.

    def _judge(self, beats: Heartbeats) -> Verdict | None:
        """A verdict on the ranks this one watches, if there is reason for one."""
        everybody = self._world.rank == 0 or self._lost_contact
        watched = range(self._world.size if everybody else 1)
        found, now = beats.read(watched), time.monotonic()
        for rank, beat in found.items():
            if rank not in self._seen or self._seen[rank][0] != beat.count:
                self._seen[rank] = (beat.count, now)
        if failed := [rank for rank, beat in found.items() if beat.left]:
            return Verdict("; ".join(f"{_name(rank, found[rank])} ended: {found[rank].left}" for rank in failed), [])
        patience = _STALE_BEATS * self._interval if self._lost_contact else self.timeout
        silent = [
            rank
            for rank, (_, changed) in self._seen.items()
            if now - changed > patience and found[rank].left is None and rank != self._world.rank
        ]
        if silent:
            names = ", ".join(_name(rank, found[rank]) for rank in silent)
            return Verdict(f"{names} is missing: no sign of life for {patience:.0f} s.", silent)
        absent = [rank for rank in watched if rank not in found]
        if absent and now - self._since > self.slow:
            return Verdict(f"rank {_list(absent)} did not come up within {self.slow:.0f} s of the others.", absent)
        # Ranks wait for each other: as long as one of them moves, or may take its time, the rest do not hang.
        return _hung(found) if everybody and all(beat.stuck for beat in found.values()) else None

    def _beat(self, count: int) -> Beat:
        place, waiting = "nowhere", False
        if frame := self._frame():
            code = frame.f_code
            place = f"{code.co_name} ({'/'.join(code.co_filename.split('/')[-2:])}:{frame.f_lineno})"
            waiting = any(part in code.co_filename for part in _COLLECTIVES)
        stuck = time.monotonic() - self._since > self._limit
        return Beat(count, self._step, self._phase, self._host, place, waiting, stuck, self._left)

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main)


def _name(rank: int, beat: Beat) -> str:
    return f"rank {rank} ({beat.host}, after step {beat.step}, {beat.phase})"


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _hung(beats: dict[int, Beat]) -> Verdict:
    """Who keeps the others waiting; where the places do not tell, where everybody stands."""
    culprits = {rank: beat for rank, beat in beats.items() if not beat.waiting} or beats
    if len(culprits) < len(beats) or len(beats) == 1:
        names = "; ".join(f"{_name(rank, beat)} hangs in {beat.place}" for rank, beat in culprits.items())
        return Verdict(f"{names}.", [])
    places: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        places.setdefault(f"{beat.place} after step {beat.step}", []).append(rank)
    few_first = sorted(places.items(), key=lambda item: len(item[1]))
    return Verdict("nothing moves: " + "; ".join(f"rank {_list(each)} in {place}" for place, each in few_first), [])
