"""Reads and writes safetensors files chunk by chunk, in buffers that are reused.

The library's ``save_file`` needs all tensors at once, and the pages that its ``safe_open`` maps count as this process's
memory. The format is eight bytes of length, a JSON header, raw bytes: <https://github.com/huggingface/safetensors#format>.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moh_megatron.io.errors import UserError
from moh_megatron.io.hashing import FileEntry, read_in_order

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
WEIGHT_TYPES = "F32, F16 or BF16"
"""The dtypes of weights; I64 is for balancing biases, which count steps."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_FLUSH_BYTES = 1 << 25
"""Written before the system is asked to bring it to the disk. Left to itself, it keeps gigabytes in memory first."""


class Entry(NamedTuple):
    """Describes a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Index of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Scratch:
    """Buffers that are reused after ``reset``, which gives up what they hold."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._taken = 0

    def reset(self) -> None:
        """Make all buffers free."""
        self._taken = 0

    def take(self, nbytes: int) -> Tensor:
        """A free buffer, uint8 [nbytes], of any content."""
        if self._taken == len(self._blocks):
            self._blocks.append(torch.empty(nbytes, dtype=torch.uint8))
        elif self._blocks[self._taken].numel() < nbytes:
            self._blocks[self._taken] = torch.empty(nbytes, dtype=torch.uint8)
        self._taken += 1
        return self._blocks[self._taken - 1][:nbytes]


class SafetensorsFile:
    """A file opened for positioned reads.

    Raises:
        UserError: the file is missing, cut short, or no safetensors file; the message names the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # Opening a pipe would wait for a writer.
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}). Expected a safetensors file.") from None
        try:
            # Conversions read tensors in the order in which files of this project, and most others, hold them.
            read_in_order(self._handle)
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in a buffer of ``scratch``."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:])
        width = math.prod(shape[1:]) * entry.dtype.itemsize
        block = scratch.take(shape[0] * width)
        if block.numel():
            self._fill(block.numpy().data, entry.start + start * width, name)
        return block.view(entry.dtype).view(shape)

    def read(self, name: str, scratch: Scratch) -> Tensor:
        """A full tensor, in a buffer of ``scratch``."""
        entry = self.entries[name]
        return self.rows(name, 0, entry.shape[0], scratch) if entry.shape else self._scalar(name, scratch)

    def _scalar(self, name: str, scratch: Scratch) -> Tensor:
        block = scratch.take(self.entries[name].nbytes)
        self._fill(block.numpy().data, self.entries[name].start, name)
        return block.view(self.entries[name].dtype)[0]

    def _fill(self, view: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(view):
            with self._naming_file():
                count = os.preadv(self._handle, [view[done:]], offset + done)
            if not count:
                raise UserError(f"{self.path}: ends inside {name}. Fetch or write the file again.")
            done += count

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        # The system does not say in which file a read failed.
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _read_header(self) -> dict[str, Entry]:
        with self._naming_file():
            status = os.fstat(self._handle)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{self.path}: must be a safetensors file. Got no regular file.")
            size = status.st_size
            length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise UserError(
                f"{self.path}: must be a safetensors file. Got {size} bytes with no whole header: cut short, or "
                f"something else. Fetch or write it again."
            )
        try:
            header = json.loads(os.pread(self._handle, length, 8))
            header.pop("__metadata__", None)
            entries = {}
            for name, item in header.items():
                first, last = item["data_offsets"]
                if any(type(number) is not int for number in (first, last, *item["shape"])):
                    raise UserError(
                        f"{self.path}: {name} must have a shape and data_offsets of whole numbers. "
                        f"Got {item['shape']} and {item['data_offsets']}."
                    )
                if item["dtype"] not in DTYPES:
                    raise UserError(
                        f"{self.path}: {name} must be of {WEIGHT_TYPES}. Got {item['dtype']}: quantised or other "
                        f"weights must be converted first."
                    )
                entry = Entry(DTYPES[item["dtype"]], tuple(item["shape"]), 8 + length + first)
                if last - first != entry.nbytes or first < 0:
                    raise UserError(
                        f"{self.path}: {name} of shape {list(entry.shape)} must take {entry.nbytes} bytes. "
                        f"Got {last - first}."
                    )
                if entry.start + entry.nbytes > size:
                    raise UserError(
                        f"{self.path}: cut short: {name} ends at byte {entry.start + entry.nbytes}, the file has "
                        f"{size}. Fetch or write it again."
                    )
                entries[name] = entry
            self._check_layout(entries, 8 + length, size)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.path}: the header is no safetensors header ({error!r}).") from None
        return entries

    def _check_layout(self, entries: Mapping[str, Entry], start: int, size: int) -> None:
        """Raise UserError unless the tensors fill the file from byte ``start`` on, without gaps."""
        end, before = start, "the header"
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
            if entry.start != end:
                raise UserError(
                    f"{self.path}: {name} must begin at byte {end}, where {before} ends. Got {entry.start}: the header "
                    "is of another file. Fetch or write it again."
                )
            end, before = end + entry.nbytes, name
        if end != size:
            raise UserError(
                f"{self.path}: must end at byte {end}, with {before}. Got {size} bytes: something was added, or the "
                "header is of another file. Fetch or write it again."
            )


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand, chunk by chunk and in their order; a context manager.

    When the block succeeds the file is on the disk. When it fails the file stays incomplete.

    Args:
        tensors: dtype and shape of each tensor by name, in the order of writing.
        hashed: whether ``entry`` is needed.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, hashed: bool = False
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends: list[tuple[str, int]] = []
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            ends.append((name, end))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self.path, self._size, self._written, self._total = path, 8 + len(text) + offset, 0, offset
        self._names = iter(ends)
        self._current, self._end = "", 0
        self._digest = hashlib.sha256() if hashed else None
        self._position, self._submitted = 0, 0
        self._helper = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None
        self._file = path.open("wb", buffering=0)
        try:
            self._write(memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._written == self._total, f"{self._current} is not written completely"
                self._finish()
        finally:
            self._close()

    @property
    def entry(self) -> FileEntry:
        """Size and hash of the complete file."""
        assert self._digest is not None
        return FileEntry(self._size, self._digest.hexdigest())

    def append(self, name: str, chunk: Tensor) -> None:
        """Write the next rows of ``name``, which must be the next tensor. Raises OSError where the disk refuses."""
        while self._written == self._end and name != self._current:
            self._current, self._end = next(self._names)
        data = chunk.contiguous().flatten().view(torch.uint8)
        self._written += data.numel()
        assert name == self._current, f"{name} is not the next tensor"
        assert self._written <= self._end, f"{name} is larger than announced"
        if data.numel():
            self._write(data.numpy().data)
        if self._written == self._total:
            # A conversion may have many files open; those that are complete need no more resources.
            self._finish()

    def _write(self, data: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        while data:
            count = self._file.write(data)
            self._position, data = self._position + count, data[count:]
        if self._position - self._submitted >= _FLUSH_BYTES:
            self._drop_flushed()
            self._flushing = self._helper.submit(os.fsync, self._file.fileno())
            self._submitted = self._position

    def _drop_flushed(self) -> None:
        """Wait for the flush under way, and free the page cache of what is on the disk, which is not read again soon.

        Its memory is reused for the next bytes. On a virtual machine new memory may cost more time than the disk.
        """
        if self._flushing is not None:
            self._flushing.result()
            with suppress(AttributeError):  # macOS does not have it.
                os.posix_fadvise(self._file.fileno(), 0, self._submitted, os.POSIX_FADV_DONTNEED)

    def _finish(self) -> None:
        if not self._file.closed:
            try:
                self._drop_flushed()
                os.fsync(self._file.fileno())
            finally:
                self._close()

    def _close(self) -> None:
        self._helper.shutdown()
        self._file.close()
