"""Lines of plain and compressed files, each of bounded length, with every fault of the file named."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from moh_megatron.io.errors import UserError

Advance = Callable[[int], object]
"""Told how many bytes of the files on disk were read since the last call."""


class Lines:
    """Lines of one file from ``start`` on, as bytes with their ends.

    ``read(limit)`` gives at most ``limit`` bytes and the rest of a longer line at the next calls; b"" at the end.
    """

    def __init__(self, file: IO[bytes], raw: IO[bytes], start: int) -> None:
        self._file, self._raw = file, raw
        self.offset = start
        """Bytes of the uncompressed file before what is read next."""
        self.number = 0
        """Of the line read last; 1 is the first that was begun here."""
        self.begun = start
        """Offset at which the line began that the last read was begun in."""
        self._line_start = start
        self._inside = False

    def read(self, limit: int) -> bytes:
        return self._count(self._file.readline(limit))

    def block(self, size: int) -> bytes:
        """The next ``size`` bytes, wherever lines end in them; ``number`` is then of the line the block ends in."""
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
        """Whether the line read last goes on."""
        return self._inside

    def skip_line(self) -> int:
        """Pass over what is left of the current line; how many bytes that was, the line's end included."""
        skipped = 0
        while self._inside and (chunk := self.read(1 << 20)):
            skipped += len(chunk)
        self._inside = False
        return skipped

    def on_disk(self) -> int:
        """Position in the file as it lies on disk."""
        return self._raw.tell()


@contextmanager
def opened(path: str, start: int = 0) -> Iterator[Lines]:
    """The lines of a plain, .gz or .zst file. ``start`` is for plain files: the first line that begins there or later.

    Raises UserError, also while lines are read inside the block, for a file that cannot be read or is cut off.
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
        raise UserError(f"{path}: the gzip stream is cut off. {again}") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a sound gzip file ({error}). {again}") from None
    except OSError as error:
        if error.errno is None and path.endswith(".zst"):  # pyarrow's own
            cut = "the zstd stream is cut off" if "Truncated" in str(error) else f"not a sound zstd file ({error})"
            raise UserError(f"{path}: {cut}. {again}") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the disk and the permissions.") from None


def _decompressed(path: str, raw: IO[bytes]) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if path.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)  # pyright: ignore[reportArgumentType]
    return raw
