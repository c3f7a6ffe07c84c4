"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from moh_megatron.io.errors import Fault, UserError

logger = logging.getLogger(__name__)

_LONGEST_PREFIX = 40
"""Of a temporary folder's name; the whole name may be as long as the file system allows."""
_ROOM, _PERMISSION = "Free some space, or name another disk.", "Change its permissions, or name another folder."
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "Name a folder on a disk that can be written.",
    errno.EFBIG: "Raise the limit on the size of a file (ulimit -f), or name another file system.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENOMEM: "Give the process more memory (ulimit -v, or the job's).",
    errno.ENOENT: "It was removed while it was written: start again.",
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    What stands at ``target`` then is replaced: the caller has made sure that it may be. A link is followed, and stays.
    Folders above that were missing vanish, too, when the block does not end well. SIGTERM and SIGHUP, where nothing
    else handles them, end the block as a SystemExit of 128 and their number. They and Ctrl-C wait until the folder is
    in place and what it replaced is gone, or what was begun is.

    Raises:
        UserError: a file stands where a folder above ``target`` is needed, or see ``place_of``.
        Fault: the disk is full or refuses. A file elsewhere that cannot be read stays an OSError.
    """
    place = place_of(target)
    with _requests_to_end(target) as requests, _workplace(target, place, requests) as (new, old):
        yield new
        requests.wait = True
        try:
            if place.exists():
                place.rename(old)
            new.rename(place)
        except BaseException:
            if old.exists() and not place.exists():
                old.rename(place)
            raise
        requests.whole = True
        flush_names(place.parent)


def place_of(target: Path) -> Path:
    """Where a new folder ``target`` comes to lie, links followed.

    Raises:
        UserError: none can lie there, or this process runs in the one that would be replaced.
    """
    place = _resolved(target)
    # What a shell stands in must not become another folder below its feet.
    if place.exists() and place.samefile("."):
        raise UserError(
            f"{target}: must be another folder than the one this command runs in, which a new one would replace. "
            "Name a folder below it, or run the command from elsewhere."
        )
    return place


def _resolved(path: Path) -> Path:
    try:
        place = path.resolve()
        place.exists()
    except (OSError, RuntimeError) as error:  # links in a circle are the second
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be a folder ({reason}). Name another one.") from None
    return place


@contextmanager
def _workplace(target: Path, place: Path, requests: _Requests) -> Iterator[tuple[Path, Path]]:
    """The folder that becomes ``place``, and a name for what it replaces; both are gone in the end."""
    missing: list[Path] = []
    workplace = None
    try:
        try:
            missing = [each for each in place.parents if not each.exists()]
            place.parent.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=f".{place.name[:_LONGEST_PREFIX]}.", dir=place.parent))
            # The folder keeps its name inside the temporary one: transformers names its copy of the code after it.
            new, old = workplace / "new" / place.name, workplace / "old"
            new.mkdir(parents=True)
        except OSError as error:
            raise _refusal(target, error) from error
        try:
            yield new, old
        except OSError as error:
            if not _is_of_writing(error, workplace, place):
                raise
            remedy = _REMEDIES.get(error.errno or 0, "Start again, or name another folder.")
            raise Fault(f"{target}: could not be written ({error}). {remedy}") from error
    finally:
        requests.wait = True
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
        for each in missing:  # the deepest first; one that holds something stays
            with suppress(OSError):
                each.rmdir()


def _refusal(target: Path, error: OSError) -> UserError | Fault:
    if isinstance(error, NotADirectoryError | FileExistsError):
        return UserError(f"{target}: a file stands where a folder is needed, at {error.filename}. Name another folder.")
    if error.errno == errno.ENAMETOOLONG:
        return UserError(f"{target}: cannot be a folder ({error.strerror}). Name another one.")
    return Fault(f"{target}: cannot write beside it ({error}). Name a folder on a disk that can be written.")


class _Requests:
    """Handles signals that ask this process to end."""

    def __init__(self) -> None:
        self.wait, self.whole = False, False
        """Whether the process is not to be interrupted, and whether the folder is in place."""
        self.received: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if not self.wait:
            # A second one must not interrupt the tidying up.
            self.wait = True
            self.end()

    def end(self) -> None:
        """Raise what the first one received stands for, if there was one."""
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)


@contextmanager
def _requests_to_end(target: Path) -> Iterator[_Requests]:
    requests = _Requests()
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    in_charge = threading.current_thread() is threading.main_thread()
    handled = [number for number in usual if in_charge and signal.getsignal(number) is usual[number]]
    for number in handled:
        signal.signal(number, requests)
    try:
        yield requests
        requests.end()
    except (SystemExit, KeyboardInterrupt):
        if requests.received is not None:
            state = ", which is whole" if requests.whole else " before it was whole. Nothing was left behind"
            with suppress(OSError):  # a terminal that hung up takes no words
                logger.warning(f"{target}: ended by {requests.received.name}{state}.")
        raise
    finally:
        for number in handled:
            signal.signal(number, usual[number])


def _is_of_writing(error: OSError, *places: Path) -> bool:
    # A failed write names no file; one of copying that fills the disk names the source.
    if error.errno in _FULL or (error.filename is None and error.errno is not None):
        return True
    return error.filename is not None and any(Path(os.fsdecode(error.filename)).is_relative_to(each) for each in places)


def refuse_unless_new(target: Path, another: str = "name another folder") -> None:
    """Raise UserError unless ``target`` is absent or an empty folder; ``another`` says how to write elsewhere."""
    place = place_of(target)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{target}: must be new or empty. Got something there; {another}, or move it away.")


def refuse_inside(target: Path, source: Path) -> None:
    """Raise UserError where ``target`` lies in the ``source`` it is made of, or is it."""
    if _resolved(target).is_relative_to(_resolved(source)):
        raise UserError(f"{target}: must lie outside what is converted, {source}. Name another folder.")


def flush_names(folder: Path) -> None:
    """Make sure that the disk knows the names in ``folder``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
