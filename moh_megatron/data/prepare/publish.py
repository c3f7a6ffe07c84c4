"""A folder that appears complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def published_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling of ``folder`` to fill. It takes the folder's place when the block ends well.

    What stood there before is removed only then; when the block fails, the temporary folder is. Temporary folders that
    dead processes of this machine left are cleared. Raises OSError where the disk fails.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    partial = _sibling(folder, "partial")
    partial.mkdir()
    try:
        with _opened(partial) as descriptor:
            with suppress(OSError):  # a file system without locks: what this run leaves will stay
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield partial
            former = _sibling(folder, "former")
            if folder.exists():
                os.rename(folder, former)
            os.rename(partial, folder)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}.{socket.gethostname()}.{os.getpid()}")


def _clear_leftovers(folder: Path) -> None:
    for kind in ("partial", "former"):
        prefix = f".{folder.name}.{kind}.{socket.gethostname()}."
        for path in folder.parent.iterdir():
            if path.name.startswith(prefix):
                # The system lets a lock go when its process dies; where it is held, flock raises.
                with suppress(OSError), _opened(path) as descriptor:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
