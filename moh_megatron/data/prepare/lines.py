"""Reads lines of plain and compressed files in bounded memory; errors name what is wrong with the file."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from moh_megatron.io.errors import UserError

_WINDOW = 128 * 1024**2
"""The largest window of a zstd file that is read: the decompressor keeps that much of the text in memory."""
_ZSTD_FRAME, _SKIPPABLE_FRAMES = 0xFD2FB528, range(0x184D2A50, 0x184D2A60)

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
            if "too much memory" in str(error):
                raise UserError(_too_wide(path)) from None
            truncated = "Truncated" in str(error)
            finding = "the zstd stream is truncated" if truncated else f"not a valid zstd file ({error})"
            raise UserError(f"{path}: {finding}. {again}") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the disk and the permissions.") from None


def _too_wide(path: str) -> str:
    """What to do with a zstd file that is sound, but needs a larger window than is read."""
    window = _zstd_window(path)
    found = f"a window of {window / 1024**2:,.0f} MiB" if window > _WINDOW else "a larger one"
    plain = path.removesuffix(".zst")
    return (
        f"{path}: the window of a zstd file must be of at most {_WINDOW // 1024**2} MiB. Got {found}, as zstd --long "
        f"makes it. Compress it again: zstd -d --long=31 {path} -o {plain} && zstd --rm -f {plain}, or give {plain} as "
        "it is."
    )


def _zstd_window(path: str) -> int:
    """The window of the first frame of data, in bytes; 0 where there is none (RFC 8878, sections 3.1.1 and 3.1.2)."""
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8 and int.from_bytes(head[:4], "little") in _SKIPPABLE_FRAMES:
            file.seek(int.from_bytes(head[4:], "little"), 1)
        head += file.read(10)
    if len(head) < 6 or int.from_bytes(head[:4], "little") != _ZSTD_FRAME:
        return 0
    descriptor = head[4]
    if descriptor & 0x20:  # A single segment: the window is the content, whose size follows the dictionary's id.
        start, size = 5 + (0, 1, 2, 4)[descriptor & 3], (1, 2, 4, 8)[descriptor >> 6]
        return int.from_bytes(head[start : start + size], "little")
    base = 1 << (10 + (head[5] >> 3))
    return base + base // 8 * (head[5] & 7)


def _decompressed(path: str, raw: IO[bytes]) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # pyright: ignore[reportReturnType]
    if path.endswith(".zst"):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 1 << 20)  # pyright: ignore[reportArgumentType]
    return raw
