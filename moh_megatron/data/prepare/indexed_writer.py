"""Writes and reads Megatron's .bin and .idx as a stream, byte for byte as megatron.core.datasets.indexed_dataset does.

We have our own writer because importing megatron.core takes seconds and hundreds of megabytes, and because its builder
holds the lengths of all documents as Python integers.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moh_megatron.io.errors import UserError

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
LONGEST = 2**31 - 1
"""The most tokens of a document that the format can hold."""
CHUNK = 1 << 20
"""Lengths of documents read at once."""


def token_dtype(entries: int) -> Any:
    """The dtype in which Megatron stores tokens of a vocabulary of ``entries``. Raises UserError beyond int32."""
    if entries > 2**31:
        raise UserError(f"The tokenizer has {entries} entries; token ids must fit int32, the format's largest type.")
    return np.uint16 if entries < 65500 else np.int32


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx from tokens and the lengths of the documents.

    A document without tokens is kept, as in Megatron-LM's tool: its entry spans no sequence.
    """

    def __init__(self, prefix: Path, dtype: Any) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.documents = self.tokens = self._sequences = 0
        self._bin: IO[bytes] = open(f"{prefix}.bin", "wb")  # noqa: SIM115
        self._lengths: IO[bytes] = open(f"{prefix}.lengths", "w+b")  # noqa: SIM115
        self._digest = hashlib.sha256()

    def add_tokens(self, tokens: bytes | memoryview) -> None:
        """Append tokens, of any number of documents."""
        self._bin.write(tokens)
        self._digest.update(tokens)

    def add_documents(self, lengths: NDArray[np.int64]) -> None:
        """Append documents by their numbers of tokens."""
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())
        self._sequences += int(np.count_nonzero(lengths))
        self._lengths.write(lengths.astype("<i8").tobytes())

    def finish(self) -> tuple[str, str]:
        """Write the index and return the sha256 of .bin and of .idx."""
        self._bin.close()
        digest = hashlib.sha256()
        with open(f"{self.prefix}.idx", "wb") as index:

            def write(data: bytes) -> None:
                index.write(data)
                digest.update(data)

            code = next(code for code, dtype in CODES.items() if np.dtype(dtype) == self.dtype)
            write(HEADER + struct.pack("<QBQQ", VERSION, code, self._sequences, self.documents + 1))
            for lengths in self._read_lengths():
                write(lengths[lengths > 0].astype("<i4").tobytes())
            self._write_running_sums(write, lambda lengths: lengths[lengths > 0] * self.dtype.itemsize, exclusive=True)
            write(struct.pack("<q", 0))
            self._write_running_sums(write, lambda lengths: (lengths > 0).astype(np.int64), exclusive=False)
        self.close()
        return self._digest.hexdigest(), digest.hexdigest()

    def close(self) -> None:
        """Close the files and remove the temporary one."""
        self._bin.close()
        self._lengths.close()
        Path(f"{self.prefix}.lengths").unlink(missing_ok=True)

    def _write_running_sums(
        self, write: Callable[[bytes], None], value: Callable[[NDArray[np.int64]], NDArray[np.int64]], exclusive: bool
    ) -> None:
        """Write the running sums of ``value`` over the documents, without its own value if ``exclusive``."""
        total = 0
        for lengths in self._read_lengths():
            values = value(lengths)
            sums = total + np.cumsum(values)
            write((sums - values if exclusive else sums).astype("<i8").tobytes())
            total = int(sums[-1]) if len(sums) else total

    def _read_lengths(self) -> Iterator[NDArray[np.int64]]:
        self._lengths.flush()
        self._lengths.seek(0)
        while data := self._lengths.read(8 * CHUNK):
            yield np.frombuffer(data, dtype="<i8").astype(np.int64)


class Index:
    """The content of PREFIX.idx, memory-mapped."""

    def __init__(self, prefix: str | Path) -> None:
        path = Path(f"{prefix}.idx")
        with open(path, "rb") as file:
            head = file.read(len(HEADER) + 25)
        if len(head) < len(HEADER) + 25 or not head.startswith(HEADER):
            raise UserError(f"{path}: not an index of Megatron's. Prepare the dataset again.")
        version, code, sequences, entries = struct.unpack("<QBQQ", head[len(HEADER) :])
        if version != VERSION or code not in CODES:
            raise UserError(f"{path}: expected version {VERSION} and a known dtype. Got {version} and {code}.")
        self.dtype: Any = np.dtype(CODES[code])
        size = path.stat().st_size
        needed = len(head) + 12 * sequences + 8 * entries
        if size < needed:
            raise UserError(f"{path}: expected {needed} bytes. Got {size}. Prepare the dataset again.")
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=0)
        start = len(head)
        self.lengths: NDArray[np.int32] = raw[start : start + 4 * sequences].view("<i4")
        """The number of tokens of each sequence."""
        self.pointers: NDArray[np.int64] = raw[start + 4 * sequences : start + 12 * sequences].view("<i8")
        """The position at which each sequence begins, in bytes."""
        self.documents: NDArray[np.int64] = raw[start + 12 * sequences : needed].view("<i8")
        """The index of the first sequence of each document, and at the end the number of sequences."""


def open_tokens(prefix: str | Path) -> NDArray[Any]:
    """All tokens of PREFIX.bin in order, memory-mapped."""
    return np.memmap(f"{prefix}.bin", dtype=Index(prefix).dtype, mode="r")
