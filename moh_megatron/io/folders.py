"""Checks whether a folder can be written to before anything is measured or computed for it."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from moh_megatron.io.errors import UserError

LONGEST_NAME = 255
"""The most bytes of a file's name on every usual file system."""


def resolve_target(target: Path) -> Path:
    """The path of a new folder ``target``, links followed.

    Raises:
        UserError: no folder can be there, or this process runs in the one that would be replaced.
    """
    path = resolved(target)
    # The working directory of a shell must not be replaced by another folder.
    if path.exists() and path.samefile("."):
        raise UserError(
            f"{target}: must be another folder than the one this command runs in, which a new one would replace. "
            "Name a folder below it, or run the command from elsewhere."
        )
    return path


def refuse_unless_new(target: Path, another: str = "name another folder") -> None:
    """Raise UserError unless ``target`` is absent or an empty folder; ``another`` says how to write elsewhere."""
    path = resolve_target(target)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{target}: must be new or empty. Got something there; {another}, or move it away.")


def refuse_inside(target: Path, source: Path) -> None:
    """Raise UserError where ``target`` is the ``source`` it is made of, or lies inside it."""
    if resolved(target).is_relative_to(resolved(source)):
        raise UserError(f"{target}: must lie outside what is converted, {source}. Name another folder.")


def check_writable(folder: Path) -> None:
    """Raise UserError unless results can be written to ``folder``, which is tried.

    A folder that does not exist is created for the trial, and removed again.
    """
    created: list[Path] = []
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: must be a folder to write to. Got: {error.strerror}; name another with --out."
        ) from None
    finally:
        remove_empty(created)


def remove_empty(folders: list[Path]) -> None:
    """Remove ``folders``, in this order, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def flush_folder(folder: Path) -> None:
    """Make sure that the names in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resolved(path: Path) -> Path:
    """``path`` without links. Raises UserError where the links form a circle, or a name is too long."""
    try:
        # From Python 3.13 on, resolve() says nothing of links in a circle.
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
        target = path.resolve()
        # The system looks at no name below a folder that is absent.
        if any(len(os.fsencode(name)) > LONGEST_NAME for name in target.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder ({error.strerror}). Name another one.") from None
    return target
