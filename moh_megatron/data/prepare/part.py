"""A prepared part on disk: tokens of its documents, a record of each, its rejects; complete once its .json is there.

Whether a document is for training or validation, and whether it is a duplicate, is not decided here: parts do not
change when the corpus grows.
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
"""A document: its tokens with the one that ends it, bytes of UTF-8, the first 16 bytes of their sha256, why it is left
out (0: it is not)."""
SHORT, LONG = 1, 2
RECORDS_READ = 1 << 18


@dataclass(frozen=True)
class PartSummary:
    documents: int
    tokens: int
    text_bytes: int
    in_pieces: int
    """Documents that were encoded in several pieces."""
    rejects: int
    lines: tuple[int, ...]
    """Of each segment."""
    sizes: tuple[int, int, int]
    """Bytes of the three files."""


@dataclass(frozen=True)
class PartFiles:
    """Where part ``number`` of a working folder lies."""

    folder: Path
    number: int

    def path(self, kind: str) -> Path:
        """kind: tokens, documents, rejects, json."""
        return self.folder / f"{self.number:06}.{kind}"

    def summary(self) -> PartSummary | None:
        """None where the part is not complete."""
        try:
            fields = json.loads(self.path("json").read_text())
            lines, expected = tuple(fields.pop("lines")), tuple(fields.pop("sizes"))
            summary = PartSummary(**fields, lines=lines, sizes=expected)
            sizes = tuple(self.path(kind).stat().st_size for kind in ("tokens", "documents", "rejects"))
        except (FileNotFoundError, KeyError, ValueError, TypeError):
            return None
        return summary if sizes == summary.sizes else None

    def records(self) -> Iterator[NDArray[Any]]:
        """The documents' records in order, some at a time."""
        with open(self.path("documents"), "rb") as file:
            while data := file.read(RECORD.itemsize * RECORDS_READ):
                yield np.frombuffer(data, dtype=RECORD)

    def rejects(self) -> Iterator[dict[str, Any]]:
        """``segment`` (of the part), ``line`` (of the segment), ``reason``."""
        with open(self.path("rejects"), encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


class PartWriter:
    """Fills a part under a temporary name; ``finish`` puts it in place."""

    def __init__(self, files: PartFiles, dtype: Any) -> None:
        self._files, self._dtype = files, np.dtype(dtype)
        self._stem = files.folder / f".{files.number:06}.{socket.gethostname()}.{os.getpid()}"
        self._tokens = open(self._temporary("tokens"), "wb")  # noqa: SIM115
        self._documents = open(self._temporary("documents"), "wb")  # noqa: SIM115
        self._rejects = open(self._temporary("rejects"), "w", encoding="utf-8")  # noqa: SIM115
        self._start = self._open_tokens = self._pieces = 0
        self.documents = self.tokens = self.text_bytes = self.in_pieces = self.rejects = 0

    def _temporary(self, kind: str) -> Path:
        return Path(f"{self._stem}.{kind}")

    def add_piece(self, ids: NDArray[Any]) -> None:
        """The next tokens of the document that is being written."""
        self._tokens.write(ids.tobytes())
        self._open_tokens += len(ids)
        self._pieces += 1

    def end_document(self, eos_token_id: int, text_bytes: int, digest: bytes, dropped: int) -> None:
        """Close the document; one without tokens gets no ``eos_token_id``, as in Megatron-LM's tool."""
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
        self.in_pieces += self._pieces > 1
        self._start += self._open_tokens * self._dtype.itemsize
        self._open_tokens = self._pieces = 0

    def reject(self, segment: int, line: int, reason: str) -> None:
        """What was written of the open document is taken back."""
        self._rewind()
        self._pieces = 0
        record = {"segment": segment, "line": line, "reason": reason}
        self._rejects.write(json.dumps(record, ensure_ascii=True) + "\n")
        self.rejects += 1

    def _rewind(self) -> None:
        if self._open_tokens:
            self._tokens.seek(self._start)
            self._tokens.truncate()
            self._open_tokens = 0

    def finish(self, lines: tuple[int, ...]) -> PartSummary:
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
        """Leave nothing, after a failure."""
        with suppress(OSError):
            self.close()
        for kind in ("tokens", "documents", "rejects", "json"):
            self._temporary(kind).unlink(missing_ok=True)
