"""A large file written once, from start to end, past the page cache where its file system can.

Through the cache every byte is copied once more and every page asked for: on a machine that gives out memory as it is
touched that took six times as long as the disk, where the memory had not been used just before.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from mmap import mmap
from pathlib import Path

_BLOCK_BYTES = 1 << 23
"""Written and hashed at once, while the next blocks are filled."""
BLOCKS = 8
"""As many keep a disk busy while a tensor is taken whole."""
_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""Linux knows it, macOS does not."""


class DirectFile:
    """Bytes are appended; writing them and computing their hash go on in other threads. ``finish`` or ``abandon`` it.

    Args:
        hashed: whether ``sha256`` is wanted.
        blocks: of memory, 8 MiB each, at most.
    """

    def __init__(self, path: Path, *, hashed: bool, blocks: int = BLOCKS) -> None:
        self._handle: int | None = _opened(path)
        self._digest = hashlib.sha256() if hashed else None
        self._block: mmap | None = None
        self._filled = 0
        self._free: list[mmap] = []
        self._unmade = blocks
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
            if self._block is None:
                self._block = self._next_block()
            part = data[: _BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == _BLOCK_BYTES:
                self._hand_over()

    def finish(self) -> None:
        """Make sure that all is on the disk, and close it; nothing, where it is closed. Raises OSError."""
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
        self._block = None
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def _next_block(self) -> mmap:
        # One that was used before, if there is one: memory is taken where it is touched.
        while self._under_way and all(each.done() for each in self._under_way[0][1]):
            self._wait()
        if not self._free and self._unmade:
            self._unmade -= 1
            # An anonymous map begins at a page, as direct writing asks.
            return mmap(-1, _BLOCK_BYTES)
        if not self._free:
            self._wait()
        return self._free.pop()

    def _hand_over(self) -> None:
        if self._block is not None:
            filled = memoryview(self._block)[: self._filled]
            self._under_way.append((self._block, [helper.submit(task, filled) for task, helper in self._helpers]))
            self._block, self._filled = None, 0

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
                # Only whole sectors can be written directly: the last block goes through the cache, and every one where
                # the file system finds a page too small.
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
    # A hint that nothing depends on; macOS takes none.
    with suppress(AttributeError, OSError):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
