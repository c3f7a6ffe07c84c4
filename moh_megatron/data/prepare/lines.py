"""Reads lines of plain and compressed files in bounded memory; errors name what is wrong with the file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from moh_megatron.io.errors import UserError

Advance = Callable[[int], object]
"""Called with the number of bytes on disk that were read since the last call."""


class Lines:
    """The lines of one file from ``start`` on, as bytes with their line ends.

    ``read(limit)`` returns at most ``limit`` bytes, the rest of a longer line at the next calls, and b"" at the end.
    """

    def __init__(self, file: IO[bytes], raw: IO[bytes], start: int) -> None:
        self._file, self._raw = file, raw
        self.offset = start
        """Position in the uncompressed file, in bytes."""
        self.number = 0
        """Number of the line read last; the first that begins at ``start`` or later is 1."""
        self.begun = start
        """Offset of the beginning of the line in which the last read began."""
        self._line_start = start
        self._inside = False

    def read(self, limit: int) -> bytes:
        return self._count(self._file.readline(limit))

    def block(self, size: int) -> bytes:
        """The next ``size`` bytes, regardless of line ends; ``number`` is then that of the line the block ends in."""
        return self._count(self._file.read(size))

    def _count(self, data: bytes) -> bytes:
        if data:
            self.begun = self._line_start
            self.number += (not self._inside) + data.count(b"\n", 0, -1)
            self._line_start = self.offset + end if (end := data.rfind(b"\n") + 1) else self._line_start
            self._inside = not data.endswith(b"\n")
            self.offset += len(data)
        return data

    @property
    def inside(self) -> bool:
        """Whether the line read last continues."""
        return self._inside

    def skip_line(self) -> int:
        """Skip the rest of the current line with its line end; returns how many bytes that was."""
        skipped = 0
        while self._inside and (chunk := self.read(1 << 20)):
            skipped += len(chunk)
        self._inside = False
        return skipped

    def on_disk(self) -> int:
        """Position in the file on disk, which may be compressed."""
        return self._raw.tell()


@contextmanager
def opened(path: str, start: int = 0) -> Iterator[Lines]:
    """The lines of a plain, .gz or .zst file; of a plain one from the first that begins at ``start`` or later.

    Raises UserError, also while lines are read inside the block, for a file that cannot be read or is truncated.
    """
    again = "Copy or download the file again."
    try:
        with open(path, "rb") as raw, _decompressed(path, raw) as file:
            if start:
                raw.seek(start - 1)
            lines = Lines(file, raw, max(start - 1, 0))
            if start:
                while (rest := lines.read(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                lines.number = 0
            yield lines
    except EOFError:
        raise UserError(f"{path}: the gzip stream is truncated. {again}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a valid gzip file ({error}). {again}") from None
    except OSError as error:
        if error.errno is None and path.endswith(".zst"):  # raised by pyarrow, not by the system
            truncated = "Truncated" in str(error)
            finding = "the zstd stream is truncated" if truncated else f"not a valid zstd file ({error})"
            raise UserError(f"{path}: {finding}. {again}") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the disk and the permissions.") from None


def _decompressed(path: str, raw: IO[bytes]) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if path.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)  # pyright: ignore[reportArgumentType]
    return raw
