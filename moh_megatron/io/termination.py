"""Ends a block of code on SIGTERM, SIGHUP or Ctrl-C, or lets the signal wait where it must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_DEFAULTS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class TerminationSignals:
    """What the signals do that ask this process to end, while ``handled``."""

    def __init__(self) -> None:
        self.deferred = False
        """Whether a signal waits for the end of the block."""
        self.received: signal.Signals | None = None
        """The first one received."""

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGTERM, SIGHUP and SIGINT while the block runs, as far as their default handlers are in place.

        SIGINT raises KeyboardInterrupt, another one SystemExit of 128 and its number: at once, or at the end of the
        block where it is ``deferred``. Outside of the main thread, and where a program handles a signal itself,
        nothing changes.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        defaults = {
            number: default
            for number, default in _DEFAULTS.items()
            if in_main_thread and signal.getsignal(number) is default
        }
        for number in defaults:
            signal.signal(number, self._receive)
        try:
            yield
            self._raise_received()
        finally:
            for number, default in defaults.items():
                signal.signal(number, default)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if not self.deferred:
            # A second signal must not interrupt the clean-up.
            self.deferred = True
            self._raise_received()

    def _raise_received(self) -> None:
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
