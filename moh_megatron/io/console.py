"""Shows log records and progress bars on standard error; results of commands go to standard output.

Modules log to ``logging.getLogger(__name__)``. A command installs the handler with ``console_logging``; a program that
uses the package as a library configures the logger ``moh_megatron`` as it likes.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from typing import Any

from tqdm import tqdm

from moh_megatron.io.printable import printable

_LOGGER = logging.getLogger("moh_megatron")
_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: ", logging.CRITICAL: "error: "}


class ConsoleHandler(logging.Handler):
    """Writes records to standard error, above progress bars; warnings and errors have a prefix."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = _PREFIXES.get(record.levelno, "")
        message = printable(self.format(record))
        if record.levelno >= logging.ERROR:
            message = message.replace("\n", "\n" + " " * len(prefix))
        with suppress(OSError):  # A terminal that hung up must not end the program.
            tqdm.write(prefix + message, file=sys.stderr)
            sys.stderr.flush()


def print_result(text: object) -> None:
    """Print a result of a command on standard output, without control characters that its text may hold."""
    print(printable(str(text)))


@contextmanager
def console_logging() -> Iterator[None]:
    """Show this package's log records from INFO on while the block runs; an inner call changes nothing."""
    if any(isinstance(handler, ConsoleHandler) for handler in _LOGGER.handlers):
        yield
        return
    handler, before = ConsoleHandler(), (_LOGGER.level, _LOGGER.propagate)
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    # Libraries configure the root logger; every record would then appear twice.
    _LOGGER.propagate = False
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(before[0])
        _LOGGER.propagate = before[1]


def set_level(level: int) -> None:
    """Show records from ``level`` on: logging.WARNING under --quiet, logging.DEBUG under --verbose."""
    _LOGGER.setLevel(level)


@contextmanager
def slow_imports(words: str = "loading PyTorch") -> Iterator[None]:
    """Log ``words`` before the slow imports of the block, during which Ctrl-C ends the process at once and quietly.

    A KeyboardInterrupt would wait for the library that is being loaded, or end in a traceback or an error of its own.
    """
    _LOGGER.info(words)
    replaced = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if replaced:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def starting(processes: int) -> str:
    """What a command says that starts ``processes``, before anything slow is imported."""
    return f"starting {processes} {'process' if processes == 1 else 'processes'}: loading PyTorch"


def speak_for_rank(rank: int) -> None:
    """Leave everything but errors to rank 0, so that each message appears once and not once a rank."""
    if rank != 0:
        _LOGGER.setLevel(logging.ERROR)


@contextmanager
def errors_only() -> Iterator[None]:
    """Show nothing but errors while the block runs, because another process shows the other records."""
    before = _LOGGER.level
    _LOGGER.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _LOGGER.setLevel(before)


def is_quiet() -> bool:
    """Whether neither messages nor progress bars are shown."""
    return not _LOGGER.isEnabledFor(logging.INFO)


def is_verbose() -> bool:
    """Whether the messages of the libraries underneath are shown, too."""
    return _LOGGER.isEnabledFor(logging.DEBUG)


def chatter_hidden() -> AbstractContextManager[object]:
    """Hide what libraries print to standard output while the block runs; --verbose shows it."""
    return nullcontext() if is_verbose() else redirect_stdout(io.StringIO())


@contextmanager
def warnings_hidden(*names: str) -> Iterator[None]:
    """Hide the warnings of the loggers ``names`` while the block runs; --verbose shows them."""
    loggers = [] if is_verbose() else [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def progress_bar(description: str, total: int | None, unit: str, hidden: bool = False, **options: Any) -> tqdm:
    """A progress bar on standard error, above which log records are written; none under --quiet or where ``hidden``."""
    return tqdm(
        total=total, desc=printable(description), unit=unit, dynamic_ncols=True, disable=hidden or is_quiet(), **options
    )


@contextmanager
def elapsed_bar(description: str, interval: float = 1.0) -> Iterator[None]:
    """A progress bar for work that reports nothing until it ends: how long it runs, anew every ``interval`` seconds."""
    with progress_bar(description, None, "", bar_format="{desc}: {elapsed} so far") as bar:
        finished = threading.Event()

        def refresh() -> None:
            while not finished.wait(interval):
                bar.refresh()

        thread = threading.Thread(target=refresh, name=description, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield
        finally:
            finished.set()
            if thread.ident is not None:
                thread.join()
            bar.bar_format = "{desc}: {elapsed}"
