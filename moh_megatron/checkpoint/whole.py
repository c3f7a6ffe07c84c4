"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from moh_megatron.config.errors import Fault, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    What stands at ``target`` then is replaced: the caller has made sure that it may be. SIGTERM and SIGHUP, where
    nothing else handles them, end the block as a SystemExit of 128 and their number.

    Raises:
        UserError: a file stands where a folder above ``target`` is needed.
        Fault: the disk is full or refuses. A file elsewhere that cannot be read stays an OSError.
    """
    with _ended_by_signal(target), _workplace(target) as (new, old):
        yield new
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        flush_names(target.parent)


@contextmanager
def _workplace(target: Path) -> Iterator[tuple[Path, Path]]:
    """The folder that becomes ``target``, and a name for what it replaces; both are gone in the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The folder keeps its name inside the temporary one: transformers names its copy of the code after it.
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(
            f"{target}: a file stands where a folder is needed, at {error.filename}. Name another folder."
        ) from None
    except OSError as error:
        raise Fault(
            f"{target}: cannot write beside it ({error}). Name a folder on a disk that can be written."
        ) from error
    try:
        new, old = workplace / target.name, workplace / f"{target.name}.replaced"
        new.mkdir()
        yield new, old
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_of_writing(error, workplace, target):
            raise
        raise Fault(f"{target}: could not be written ({error}). Free some space, or name another disk.") from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


@contextmanager
def _ended_by_signal(target: Path) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        # A second one must not interrupt the tidying up.
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        received.append(signal.Signals(number).name)
        raise SystemExit(128 + number)

    received: list[str] = []
    for each in handled:
        signal.signal(each, end)
    try:
        yield
    except SystemExit:
        with suppress(OSError):  # a terminal that hung up takes no words
            for name in received:
                print(f"{target}: ended by {name} before it was whole. Nothing was left behind.", file=sys.stderr)
        raise
    finally:
        for each in handled:
            signal.signal(each, signal.SIG_DFL)


def _is_of_writing(error: OSError, *places: Path) -> bool:
    # A failed write names no file; one of copying that fills the disk names the source.
    if error.errno in _FULL or (error.filename is None and error.errno is not None):
        return True
    return error.filename is not None and any(Path(os.fsdecode(error.filename)).is_relative_to(each) for each in places)


def refuse_unless_new(target: Path) -> None:
    """Raise UserError unless ``target`` is absent or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: must be new or empty. Got something there; name another folder, or move it away.")


def flush_names(folder: Path) -> None:
    """Make sure that the disk knows the names in ``folder``."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
