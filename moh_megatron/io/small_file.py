"""Reads files that are small by nature, such as configurations and manifests, in bounded time and memory.

A named pipe, a device or a file of any size may stand where such a file is expected. Reading a pipe waits for its
writer, and reading a device may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from moh_megatron.io.errors import UserError

LIMIT = 2**28
"""The most bytes a small file may have: several times the largest tokenizer.json that is published."""
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file of any length for reading, without waiting.

    Raises:
        UserError: it is a pipe, a device or a socket; or the path leads in a circle or has a name that is too long.
        OSError: it cannot be opened; IsADirectoryError for a folder.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer. For a regular file the flag changes nothing.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, which cannot be opened
            raise _not_regular(path, os.stat(path).st_mode) from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UserError(f"{path}: cannot be read: {error.strerror}. Name the file by another path.") from None
        raise
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path, status.st_mode)
    except BaseException:
        os.close(handle)
        raise
    return open(handle, "rb")


def read_small_file(path: Path, limit: int = LIMIT) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        UserError: it is longer than ``limit``, or ``open_regular`` refuses it.
        OSError: it cannot be opened or read; IsADirectoryError for a folder.
    """
    with open_regular(path) as stream:
        _check_size(path, os.fstat(stream.fileno()).st_size, limit)
        content = stream.read(limit + 1)  # It may have grown since.
    _check_size(path, len(content), limit)
    return content


def read_small_text(path: Path, limit: int = LIMIT) -> str:
    """``read_small_file`` as text. Raises UnicodeDecodeError where it is not UTF-8."""
    return read_small_file(path, limit).decode("utf-8")


def check_small_files(folder: Path) -> None:
    """Raise UserError unless a library can read the folder's files: regular ones, and no small one above ``LIMIT``.

    Transformers opens the files of a folder itself, without such a check.
    """
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not os.path.exists(file) or file.is_dir():
            continue
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(file, status.st_mode)
        if file.suffix in (".json", ".jinja", ".model", ".txt", ".py"):
            _check_size(file, status.st_size, LIMIT)


def _not_regular(path: Path, mode: int) -> UserError:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    return UserError(f"{path}: must be a regular file. Got {kind}. Put the file itself in its place.")


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise UserError(
            f"{path}: must have at most {limit:,} bytes, as every file of its kind has. Got more. Name the right file."
        )
