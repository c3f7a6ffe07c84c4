"""A large file written once, from start to end, past the page cache where its file system can.

Through the cache every byte is copied once more and every page asked for, which took up to six times the time of the
disk on a machine that gives out memory as it is touched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import mmap
from pathlib import Path

_BLOCK_BYTES, _BLOCKS = 1 << 23, 8
"""Written and hashed at once, while the next ones are filled."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""Linux knows it, macOS does not."""


class DirectFile:
    """Bytes are appended; writing them and computing their hash go on in other threads. ``finish`` or ``abandon`` it.

    Args:
        hashed: whether ``sha256`` is wanted.
    """

    def __init__(self, path: Path, *, hashed: bool) -> None:
        self._handle: int | None = _opened(path)
        self._digest = hashlib.sha256() if hashed else None
        # Anonymous maps begin at a page, as direct writing asks, and take memory only where they are filled.
        self._free = [mmap(-1, _BLOCK_BYTES) for _ in range(_BLOCKS)]
        self._filled = 0
        # One thread each: blocks follow one another.
        tasks = [self._put] if self._digest is None else [self._put, self._digest.update]
        self._helpers = [(task, ThreadPoolExecutor(1, "direct-file")) for task in tasks]
        self._under_way: deque[tuple[mmap, list[Future[None]]]] = deque()

    @property
    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; after ``finish``."""
        assert self._digest is not None
        return self._digest.hexdigest()

    def write(self, data: memoryview) -> None:
        """Append ``data``, whose memory may be used again afterwards. Raises OSError, also of earlier bytes."""
        while data:
            part = data[: _BLOCK_BYTES - self._filled]
            self._free[-1][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == _BLOCK_BYTES:
                self._hand_over()

    def finish(self) -> None:
        """Make sure that all is on the disk."""
        if self._handle is not None:
            try:
                self._hand_over()
                while self._under_way:
                    self._wait()
                os.fsync(self._handle)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Close it as it is, and give back the memory."""
        for _, helper in self._helpers:
            helper.shutdown(cancel_futures=True)
        self._under_way.clear()
        self._free.clear()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _hand_over(self) -> None:
        block = self._free.pop()
        filled = memoryview(block)[: self._filled]
        self._under_way.append((block, [helper.submit(task, filled) for task, helper in self._helpers]))
        self._filled = 0
        if not self._free:
            self._wait()

    def _wait(self) -> None:
        """Until the oldest block under way can be filled again."""
        block, tasks = self._under_way.popleft()
        for each in tasks:
            each.result()
        self._free.append(block)

    def _put(self, block: memoryview) -> None:
        assert self._handle is not None
        while block:
            try:
                block = block[os.write(self._handle, block) :]
            except OSError as error:
                flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                # Only whole sectors can be written directly: the end of a file goes through the cache, and all of it
                # where the sectors are larger than a page.
                fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # This file system has no direct writing.
        return os.open(path, flags, 0o666)


def read_in_order(handle: int) -> None:
    """Tell the system that an open file is read from start to end: it reads farther ahead then."""
    if hasattr(os, "posix_fadvise"):  # macOS has none
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
