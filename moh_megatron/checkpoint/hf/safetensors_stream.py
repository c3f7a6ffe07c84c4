"""safetensors files read and written a piece at a time, in memory that is used again.

safetensors' own ``save_file`` wants all tensors at once, and the pages ``safe_open`` maps count as this process's
memory. The format is eight bytes of length, a JSON header, raw bytes: <https://github.com/huggingface/safetensors#format>.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moh_megatron.checkpoint.direct_file import BLOCKS, DirectFile, read_in_order
from moh_megatron.checkpoint.manifest import FileEntry
from moh_megatron.io.errors import UserError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
WEIGHT_TYPES = "F32, F16 or BF16"
"""Of weights; the fourth is for balancing biases, which count steps."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


class Entry(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Scratch:
    """Blocks of memory that are used again after ``reset``: what they held is lost then."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._taken = 0

    def reset(self) -> None:
        """All blocks are free."""
        self._taken = 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], of any content."""
        if self._taken == len(self._blocks):
            self._blocks.append(torch.empty(nbytes, dtype=torch.uint8))
        elif self._blocks[self._taken].numel() < nbytes:
            self._blocks[self._taken] = torch.empty(nbytes, dtype=torch.uint8)
        self._taken += 1
        return self._blocks[self._taken - 1][:nbytes]


class SafetensorsFile:
    """A file opened for positioned reads.

    Raises:
        UserError: it is missing, cut short, or no safetensors file; the message names the tensor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror}). Expected a safetensors file.") from None
        try:
            # A conversion takes the tensors in the order in which files of this project, and most others, hold them.
            read_in_order(self._handle)
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in memory of ``scratch``."""
        entry = self.entries[name]
        shape = (stop - start, *entry.shape[1:])
        width = math.prod(shape[1:]) * entry.dtype.itemsize
        block = scratch.take(shape[0] * width)
        if block.numel():
            self._fill(block.numpy().data, entry.start + start * width, name)
        return block.view(entry.dtype).view(shape)

    def read(self, name: str, scratch: Scratch) -> Tensor:
        """A whole tensor, in memory of ``scratch``."""
        entry = self.entries[name]
        return self.rows(name, 0, entry.shape[0], scratch) if entry.shape else self._scalar(name, scratch)

    def _scalar(self, name: str, scratch: Scratch) -> Tensor:
        block = scratch.take(self.entries[name].nbytes)
        self._fill(block.numpy().data, self.entries[name].start, name)
        return block.view(self.entries[name].dtype)[0]

    def _fill(self, view: memoryview, offset: int, name: str) -> None:
        done = 0
        while done < len(view):
            with self._named():
                count = os.preadv(self._handle, [view[done:]], offset + done)
            if not count:
                raise UserError(f"{self.path}: ends inside {name}. Fetch or write the file again.")
            done += count

    @contextmanager
    def _named(self) -> Iterator[None]:
        # The system does not say which file a read failed in.
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _read_header(self) -> dict[str, Entry]:
        with self._named():
            size = os.fstat(self._handle).st_size
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
        """Raise UserError unless the tensors fill the file from byte ``start`` on, one behind the other."""
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
    """Writes a file whose tensors are known beforehand, a piece at a time and in their order; a context manager.

    At the end the file is on the disk; see ``DirectFile``.

    Args:
        tensors: names, in the order of writing, with dtype and shape.
        hashed: whether ``entry`` is wanted.
        blocks: see ``DirectFile``.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        hashed: bool = False,
        blocks: int = BLOCKS,
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._ends: list[tuple[str, int]] = []
        offset = 0
        for name, (dtype, shape) in tensors.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._ends.append((name, end))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self.path, self._size, self._written, self._total = path, 8 + len(text) + offset, 0, offset
        self._names = iter(self._ends)
        self._current, self._end = "", 0
        self._file = DirectFile(path, hashed=hashed, blocks=blocks)
        self._file.write(memoryview(len(text).to_bytes(8, "little") + text))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._written == self._total, f"{self._current} is not written whole"
                self._file.finish()
        finally:
            self._file.abandon()

    @property
    def entry(self) -> FileEntry:
        """Size and hash of the whole file."""
        return FileEntry(self._size, self._file.sha256)

    def append(self, name: str, piece: Tensor) -> None:
        """The next rows of ``name``, whose turn it must be."""
        while self._written == self._end and name != self._current:
            self._current, self._end = next(self._names)
        data = piece.contiguous().flatten().view(torch.uint8)
        self._written += data.numel()
        assert name == self._current, f"{name} is not the next tensor"
        assert self._written <= self._end, f"{name} is larger than announced"
        if data.numel():
            self._file.write(data.numpy().data)
        if self._written == self._total:
            # Of many shards only those that are being filled hold memory.
            self._file.finish()
