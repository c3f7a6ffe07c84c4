"""Writes folders that appear complete or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.folders import flush_folder, remove_empty, resolve_target
from moh_megatron.io.remedies import write_fault
from moh_megatron.io.termination import TerminationSignals

logger = logging.getLogger(__name__)

_LONGEST_PREFIX = 40
"""Characters of the target's name in a temporary folder's; the target's may be as long as the file system allows."""
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def atomic_folder(target: Path, setting: str | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block succeeds and is removed when it does not.

    An existing ``target`` is replaced: the caller has made sure that it may be. A link is followed, and stays. Parent
    folders that had to be created are removed, too, when the block fails. SIGTERM and SIGHUP, unless something else
    handles them, end the block as a SystemExit of 128 and their number. They and Ctrl-C wait while the folder is put
    in place and while files are removed. What killed processes of this machine left behind is removed first.

    Args:
        setting: the configuration key that names ``target``, for messages; None where the command line does.

    Raises:
        UserError: a file stands where a parent folder of ``target`` is needed, or see ``resolve_target``.
        Fault: the disk is full or the file system returns an error. An OSError of another file, which cannot be read,
            is not changed.
    """
    path, complete, signals = resolve_target(target), False, TerminationSignals()
    try:
        with signals.handled(), _temporary(target, path, signals, setting) as (new, old):
            yield new
            signals.deferred = True
            try:
                if path.exists():
                    path.rename(old)
                new.rename(path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise
            complete = True
            flush_folder(path.parent)
    except (SystemExit, KeyboardInterrupt):
        if signals.received is not None:
            state = ", which is complete" if complete else " before it was complete. Nothing was left behind"
            logger.warning(f"{target}: ended by {signals.received.name}{state}.")
        raise


@contextmanager
def _temporary(
    target: Path, path: Path, signals: TerminationSignals, setting: str | None
) -> Iterator[tuple[Path, Path]]:
    """The folder that becomes ``path``, and a name for the one it replaces; both are removed in the end."""
    created: list[Path] = []
    temporary, lock = None, None
    try:
        try:
            created = [parent for parent in path.parents if not parent.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            temporary, lock = _locked_folder(path)
            # The folder already has its final name: transformers names its copy of the code after it.
            new, old = temporary / "new" / path.name, temporary / "old" / path.name
            new.mkdir(parents=True)
            old.parent.mkdir()
        except OSError as error:
            raise _refusal(target, error, setting) from error
        try:
            yield new, old
        except OSError as error:
            if not _concerns_writing(error, temporary, path):
                raise
            raise write_fault(target, error, setting) from error
    finally:
        signals.deferred = True
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        remove_empty(created)


def _prefix(path: Path) -> str:
    """What the names of temporary folders for ``path`` begin with on this machine."""
    return f".{path.name[:_LONGEST_PREFIX]}.partial.{socket.gethostname()}."


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A temporary folder beside ``path``, and the handle that locks it until it is closed or the process dies."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # On a file system without locks leftovers stay.
                fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have taken it for a leftover before it was locked.
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside ``path``; a folder that one had moved away comes back."""
    for leftover in path.parent.iterdir():
        if leftover.name.startswith(_prefix(path)):
            with suppress(OSError):
                lock = os.open(leftover, os.O_RDONLY)
                try:
                    # Raises where a process that lives holds it.
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not path.exists():
                        with suppress(FileNotFoundError):
                            (leftover / "old" / path.name).rename(path)
                    shutil.rmtree(leftover, ignore_errors=True)
                finally:
                    os.close(lock)


def _refusal(target: Path, error: OSError, setting: str | None) -> UserError | Fault:
    if isinstance(error, NotADirectoryError | FileExistsError):
        return UserError(f"{target}: a file stands where a folder is needed, at {error.filename}. Name another folder.")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{target}: cannot be a folder ({error.strerror}). Name another one.")
    return write_fault(target, error, setting)


def _concerns_writing(error: OSError, *folders: Path) -> bool:
    # A failed write names no file; an error of copying that fills the disk names the source.
    if error.errno in _WRITE_ERRORS or (error.filename is None and error.errno is not None):
        return True
    return error.filename is not None and any(
        Path(os.fsdecode(error.filename)).is_relative_to(folder) for folder in folders
    )
