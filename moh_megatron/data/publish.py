"""A folder that appears complete or not at all."""

from __future__ import annotations

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
            process = path.name.removeprefix(prefix)
            # A live process keeps its folder; our own number can only be left from an earlier life of it.
            if path.name.startswith(prefix) and process.isdigit() and not _is_other_live_process(int(process)):
                shutil.rmtree(path, ignore_errors=True)


def _is_other_live_process(number: int) -> bool:
    if number == os.getpid():
        return False
    with suppress(PermissionError):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return False
    return True
