"""A request to stop, from outside the process. Imports nothing heavy: it must stand before the slow imports."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED = 75
"""sysexits.h's EX_TEMPFAIL: saved, to be started again."""

_SAME_SIGNAL_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class SecondSignal:
    """Tells a second request from one that arrives by several ways: only what comes two seconds later is another."""

    def __init__(self) -> None:
        self.first: float | None = None
        """When the first request came, on the monotonic clock."""

    def again(self) -> bool:
        """A request is here: whether it is a second one."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        return now - self.first > _SAME_SIGNAL_SECONDS


class StopRequest:
    """Remembers that TERM, INT or USR1 came, or that the time is over; the training loop asks after each step.

    A second signal, later than the two seconds in which one request may arrive by several ways, ends the process at
    once, wherever its main thread is blocked; the last complete checkpoint stays intact.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._started = time.monotonic()
        self._insistence = SecondSignal()

    @classmethod
    def install(cls) -> StopRequest:
        """Handle the stop signals from now on; those that a launcher held back arrive now."""
        request = cls()
        # Python's handlers wait while the main thread is inside a collective; the byte the system's handler writes
        # here does not.
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=request._listen, args=(told,), daemon=True, name="signals").start()
        for number in STOP_SIGNALS:
            signal.signal(number, request._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return request

    def limit(self, seconds: float | None) -> None:
        """Ask for a stop if this process has run longer than ``seconds``."""
        if seconds is not None and self.reason is None and time.monotonic() - self._started > seconds:
            self.reason = f"train.max_seconds ({seconds:g}) is over"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"received {signal.Signals(number).name}"

    def _listen(self, told: int) -> None:
        for number in iter(lambda: os.read(told, 1)[0], None):
            if number in STOP_SIGNALS:
                self._handle(number, None)
                if self._insistence.again():
                    os._exit(128 + number)


def die_with(parent: int) -> None:
    """Receive TERM when the launching process ends, however it ends (Linux), so that no rank is left behind."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
