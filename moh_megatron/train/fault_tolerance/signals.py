"""Turns signals from outside into a request to stop. Imports nothing heavy: handlers must stand before slow imports."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
from types import FrameType

from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STOPPED = 75
"""The run was saved and is to be started again: EX_TEMPFAIL of sysexits.h."""

_SAME_SIGNAL_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class SecondSignal:
    """Tells a second request from copies of the first: only a signal that comes two seconds later is another one."""

    def __init__(self) -> None:
        self.first: float | None = None
        """The time of the first request, on the monotonic clock."""

    def received(self) -> bool:
        """Record that a signal came; return whether it is a second request."""
        now = time.monotonic()
        if self.first is None:
            self.first = now
        return now - self.first > _SAME_SIGNAL_SECONDS


def stopping_message(number: int) -> str:
    """What to say at once when the first signal to stop came."""
    return (
        f"received {signal.Signals(number).name}: stopping after this step, saving. "
        f"A second signal ends the ranks at once, without saving."
    )


class StopRequest:
    """Remembers that TERM, INT or USR1 came or that the time limit is over; the training loop asks after each step.

    One request may arrive several times within two seconds. A later signal ends the process at once, also where its
    main thread is blocked; the last complete checkpoint stays intact.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._started = time.monotonic()
        self._second_signal = SecondSignal()

    @classmethod
    def install(cls) -> StopRequest:
        """Handle the stop signals from now on; signals that were blocked until now are delivered."""
        request = cls()
        # Python runs its handlers on the main thread, which may be inside a collective. The C handler writes to this
        # pipe at once.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=request._listen, args=(read_end,), daemon=True, name="signals").start()
        for number in STOP_SIGNALS:
            signal.signal(number, request._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return request

    def limit(self, seconds: float | None) -> None:
        """Request a stop if this process has run longer than ``seconds``."""
        if seconds is not None and self.reason is None and time.monotonic() - self._started > seconds:
            self.reason = f"train.max_seconds ({seconds:g}) is over"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = self.reason or f"received {signal.Signals(number).name}"

    def _listen(self, read_end: int) -> None:
        for number in iter(lambda: os.read(read_end, 1)[0], None):
            if number in STOP_SIGNALS:
                first = self._second_signal.first is None
                self._handle(number, None)
                if self._second_signal.received():
                    os._exit(128 + number)
                if first and PARENT_VARIABLE not in os.environ:  # Our launcher says it for its ranks.
                    # In a thread of its own: a terminal that takes no more must not keep a second signal waiting.
                    threading.Thread(target=logger.info, args=(stopping_message(number),), daemon=True).start()


def die_with(parent: int) -> None:
    """Receive TERM when the process ``parent`` ends in any way (Linux), so that no rank outlives its launcher."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)
