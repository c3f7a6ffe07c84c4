"""Reads and writes prepared parts: the tokens of their documents, a record of each document, and the rejects.

A part is complete once its .json exists. Whether a document goes to training or validation, and whether it is a
duplicate, is decided later, so that parts do not change when the corpus grows.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("hash", "<u8"), ("hash_low", "<u8"), ("dropped", "u1")])
"""A document: its number of tokens including the one that ends it, its bytes of UTF-8, the first 16 bytes of their
sha256, and why it is left out (0 if it is kept)."""
SHORT, LONG = 1, 2
"""Reasons to leave a document out."""
RECORDS_READ = 1 << 18
"""Records read at once."""


@dataclass(frozen=True)
class PartSummary:
    documents: int
    tokens: int
    text_bytes: int
    in_pieces: int
    """Documents that were encoded in several chunks."""
    rejects: int
    lines: tuple[int, ...]
    """The number of lines of each segment."""
    sizes: tuple[int, int, int]
    """Bytes of the files of tokens, documents and rejects."""


@dataclass(frozen=True)
class PartFiles:
    """The files of part ``number`` in a working folder."""

    folder: Path
    number: int

    def path(self, kind: str) -> Path:
        """The file of one ``kind``: tokens, documents, rejects or json."""
        return self.folder / f"{self.number:06}.{kind}"

    def summary(self) -> PartSummary | None:
        """What the part holds; None if it is not complete."""
        try:
            fields = json.loads(self.path("json").read_text())
            lines, expected = tuple(fields.pop("lines")), tuple(fields.pop("sizes"))
            summary = PartSummary(**fields, lines=lines, sizes=expected)
            sizes = tuple(self.path(kind).stat().st_size for kind in ("tokens", "documents", "rejects"))
        except (FileNotFoundError, KeyError, ValueError, TypeError):
            return None
        return summary if sizes == summary.sizes else None

    def records(self) -> Iterator[NDArray[Any]]:
        """The records of the documents in order, RECORDS_READ at a time."""
        with open(self.path("documents"), "rb") as file:
            while data := file.read(RECORD.itemsize * RECORDS_READ):
                yield np.frombuffer(data, dtype=RECORD)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Each reject with its ``segment`` in the part, its ``line`` in the segment, and the ``reason``."""
        with open(self.path("rejects"), encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


class PartWriter:
    """Writes a part under temporary names; ``finish`` renames it into place."""

    def __init__(self, files: PartFiles, dtype: Any) -> None:
        self._files, self._dtype = files, np.dtype(dtype)
        self._stem = files.folder / f".{files.number:06}.{socket.gethostname()}.{os.getpid()}"
        self._tokens = open(self._temporary("tokens"), "wb")  # noqa: SIM115
        self._documents = open(self._temporary("documents"), "wb")  # noqa: SIM115
        self._rejects = open(self._temporary("rejects"), "w", encoding="utf-8")  # noqa: SIM115
        self._start = self._open_tokens = self._open_chunks = 0
        self.documents = self.tokens = self.text_bytes = self.in_pieces = self.rejects = 0

    def _temporary(self, kind: str) -> Path:
        return Path(f"{self._stem}.{kind}")

    def add_chunk(self, ids: NDArray[Any]) -> None:
        """Add the next tokens of the document that is being written."""
        self._tokens.write(ids.tobytes())
        self._open_tokens += len(ids)
        self._open_chunks += 1

    def end_document(self, eos_token_id: int, text_bytes: int, digest: bytes, dropped: int) -> None:
        """End the document; one without tokens gets no ``eos_token_id``, as in Megatron-LM's tool."""
        if dropped:
            self._rewind()
        elif self._open_tokens:
            self._tokens.write(np.array(eos_token_id, dtype=self._dtype).tobytes())
            self._open_tokens += 1
        high, low = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:16]))
        self._documents.write(np.array([(self._open_tokens, text_bytes, high, low, dropped)], RECORD).tobytes())
        self.documents += 1
        self.tokens += self._open_tokens
        self.text_bytes += text_bytes
        self.in_pieces += self._open_chunks > 1
        self._start += self._open_tokens * self._dtype.itemsize
        self._open_tokens = self._open_chunks = 0

    def reject(self, segment: int, line: int, reason: str) -> None:
        """Record a reject, and discard what was written of the open document."""
        self._rewind()
        self._open_chunks = 0
        record = {"segment": segment, "line": line, "reason": reason}
        self._rejects.write(json.dumps(record, ensure_ascii=True) + "\n")
        self.rejects += 1

    def _rewind(self) -> None:
        """Remove the tokens of the open document."""
        if self._open_tokens:
            self._tokens.seek(self._start)
            self._tokens.truncate()
            self._open_tokens = 0

    def finish(self, lines: tuple[int, ...]) -> PartSummary:
        """Rename the files into place; ``lines`` is the number of lines of each segment."""
        self.close()
        kinds = ("tokens", "documents", "rejects")
        sizes = tuple(self._temporary(kind).stat().st_size for kind in kinds)
        for kind in kinds:
            os.replace(self._temporary(kind), self._files.path(kind))
        summary = PartSummary(
            self.documents,
            self.tokens,
            self.text_bytes,
            self.in_pieces,
            self.rejects,
            lines,
            sizes,  # pyright: ignore[reportArgumentType]
        )
        self._temporary("json").write_text(json.dumps(asdict(summary)))
        os.replace(self._temporary("json"), self._files.path("json"))
        return summary

    def close(self) -> None:
        for file in (self._tokens, self._documents, self._rejects):
            file.close()

    def discard(self) -> None:
        """Remove the temporary files after a failure."""
        with suppress(OSError):
            self.close()
        for kind in ("tokens", "documents", "rejects", "json"):
            self._temporary(kind).unlink(missing_ok=True)
