"""Reads files from start to end, and computes their SHA-256."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_BLOCK_BYTES = 1 << 25
"""Hashed at once. Between two blocks the interpreter lock is needed: beside another thread's imports, blocks of 256 KB,
as hashlib.file_digest takes them, made almost no progress."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


def hash_file(path: Path, *, flush: bool = False) -> FileEntry:
    """Size and SHA-256 of a file; ``flush`` first makes sure that what was just written is on the disk."""
    with path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1, "read-ahead") as helper:
        if flush:
            os.fsync(stream.fileno())
        read_in_order(stream.fileno())
        digest, size = hashlib.sha256(), 0
        length = min(_BLOCK_BYTES, os.fstat(stream.fileno()).st_size + 1)
        block, other = (memoryview(bytearray(length)) for _ in range(2))
        reading = helper.submit(stream.readinto, block)
        while count := reading.result():
            reading = helper.submit(stream.readinto, other)
            digest.update(block[:count])
            block, other, size = other, block, size + count
        return FileEntry(size, digest.hexdigest())


def read_in_order(handle: int) -> None:
    """Tell the system that an open file is read from start to end, so that it reads farther ahead."""
    # The hint changes no result; macOS does not know it.
    with suppress(AttributeError, OSError):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
