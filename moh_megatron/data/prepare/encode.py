"""Encodes parts on the cores of one process: one thread reads ahead, threads of the tokenizers library encode.

Encoding releases Python's global lock, so that reading, hashing and writing happen at the same time. Texts are encoded
in batches; all batches in flight hold at most IN_FLIGHT bytes of text, or two BATCHes a thread, whatever the corpus.
"""

from __future__ import annotations

import ctypes
import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare.inputs import Input, Part
from moh_megatron.data.prepare.part import LONG, SHORT, PartFiles, PartWriter
from moh_megatron.data.prepare.read_documents import Reject, SegmentEnd, read_segment
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import UserError

BATCH = 1 << 18
"""Bytes of text encoded at once, or one larger chunk."""
IN_FLIGHT = 1 << 22
TRIM_INTERVAL = 1 << 24
"""Bytes of text after which freed memory is returned to the system: encoding takes many times the text for a moment."""


class Progress(NamedTuple):
    """What was done since the last report."""

    read: int = 0
    """Bytes on disk."""
    text: int = 0
    """Bytes of UTF-8."""
    documents: int = 0
    tokens: int = 0
    rejects: int = 0
    parts: int = 0


Report = Callable[[Progress], object]


class DocumentEnd(NamedTuple):
    """Follows the last chunk of a document."""

    text_bytes: int
    digest: bytes
    dropped: int


class PartReject(NamedTuple):
    """A rejected record of a part."""

    segment: int
    line: int
    reason: str


@dataclass
class Batch:
    """Texts of chunks to encode, and in which order they, the ends of documents and rejects follow each other."""

    texts: list[str] = field(default_factory=list)
    continued: list[bool] = field(default_factory=list)
    """Whether the text begins inside a document."""
    steps: list[DocumentEnd | PartReject | None] = field(default_factory=list)
    """None stands for the next text."""
    size: int = 0
    """Bytes of UTF-8 of the texts."""
    read: int = 0
    """Bytes on disk."""
    lines: tuple[int, ...] | None = None
    """The number of lines of each segment, if this is the last batch of a part; else None."""


@dataclass(frozen=True)
class EncodeJob:
    """What a process needs to know to encode parts."""

    inputs: tuple[Input, ...]
    data: DataConfig
    tokenizer: Path
    folder: Path
    """The working folder."""
    dtype: str
    threads: int


def encode_parts(job: EncodeJob, tokenizer: Tokenizer, parts: Iterable[tuple[int, Part]], report: Report) -> None:
    """Write the numbered parts into the working folder, one after another, without a pause between them.

    Raises UserError for an input that cannot be read and OSError if the disk fails.
    """
    writer: PartWriter | None = None
    dtype = np.dtype(job.dtype)
    numbered = list(parts)
    numbers = iter(number for number, _ in numbered)
    untrimmed = 0
    try:
        with _read_ahead(_batches(job, [part for _, part in numbered])) as batches:
            for batch, encoded in _encoded(tokenizer, dtype, batches, job.threads):
                if writer is None:
                    writer = PartWriter(PartFiles(job.folder, next(numbers)), dtype)
                before = Progress(0, writer.text_bytes, writer.documents, writer.tokens, writer.rejects)
                _write(writer, batch, encoded, tokenizer.eos_token_id)
                untrimmed += batch.size
                if untrimmed >= TRIM_INTERVAL:
                    _trim_memory()
                    untrimmed = 0
                after = Progress(0, writer.text_bytes, writer.documents, writer.tokens, writer.rejects)
                finished = batch.lines is not None
                if batch.lines is not None:
                    writer.finish(batch.lines)
                    writer = None
                done = Progress(*(new - old for new, old in zip(after, before, strict=True)))
                report(done._replace(read=batch.read, parts=int(finished)))
    finally:
        if writer is not None:
            writer.discard()


def _trim_memory() -> None:
    """Return freed memory to the system; glibc's arenas otherwise grow as blocks of several threads come and go."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _write(writer: PartWriter, batch: Batch, encoded: list[NDArray[Any]], eos_token_id: int) -> None:
    chunks = iter(encoded)
    for step in batch.steps:
        match step:
            case None:
                writer.add_chunk(next(chunks))
            case DocumentEnd(text_bytes, digest, dropped):
                writer.end_document(eos_token_id, text_bytes, digest, dropped)
            case PartReject(segment, line, reason):
                writer.reject(segment, line, reason)


def _batches(job: EncodeJob, parts: Iterable[Part]) -> Iterator[Batch]:
    for part in parts:
        batch = Batch()
        lines: list[int] = []
        read = 0

        def advance(count: int) -> None:
            nonlocal read
            read += count

        for index, segment in enumerate(part):
            digest, text_bytes, characters, chunks = hashlib.sha256(), 0, 0, 0
            for event in read_segment(job.inputs[segment.input], segment, job.data, advance):
                if isinstance(event, SegmentEnd):
                    lines.append(event.lines)
                    continue
                if isinstance(event, Reject):
                    batch.steps.append(PartReject(index, event.line, event.reason))
                else:
                    digest.update(event.utf8)
                    text_bytes += len(event.utf8)
                    characters += len(event.text)
                    left_out = dropped(characters, job.data, event.last)
                    if not left_out and event.text:
                        if batch.size and batch.size + len(event.utf8) > BATCH:
                            batch.read, read = read, 0
                            yield batch
                            batch = Batch()
                        batch.texts.append(event.text)
                        batch.continued.append(chunks > 0)
                        chunks += 1
                        batch.steps.append(None)
                        batch.size += len(event.utf8)
                    if not event.last:
                        continue
                    batch.steps.append(DocumentEnd(text_bytes, digest.digest(), left_out))
                digest, text_bytes, characters, chunks = hashlib.sha256(), 0, 0, 0
                if len(batch.steps) >= BATCH // 16:  # very many short or rejected documents
                    batch.read, read = read, 0
                    yield batch
                    batch = Batch()
        batch.read, batch.lines = read, tuple(lines)
        yield batch


def dropped(characters: int, data: DataConfig, last: bool) -> int:
    """LONG, SHORT, or 0 for a document that is kept."""
    if data.drop_longer is not None and characters > data.drop_longer:
        return LONG
    return SHORT if last and data.drop_shorter is not None and characters < data.drop_shorter else 0


def _encoded(
    tokenizer: Tokenizer, dtype: np.dtype, batches: Iterator[Batch], threads: int
) -> Iterator[tuple[Batch, list[NDArray[Any]]]]:
    """The batches in order, each with the tokens of its texts; several are encoded at the same time."""
    waiting: deque[tuple[Batch, Future[list[NDArray[Any]]]]] = deque()
    in_flight, limit = 0, max(IN_FLIGHT, 2 * threads * BATCH)
    with ThreadPoolExecutor(threads + 1) as pool:
        for batch in batches:
            while waiting and in_flight + batch.size > limit:
                first, future = waiting.popleft()
                yield first, future.result()
                in_flight -= first.size
            waiting.append((batch, pool.submit(_encode, tokenizer, dtype, batch)))
            in_flight += batch.size
            while waiting and (waiting[0][1].done() or len(waiting) > 2 * threads + 2):
                first, future = waiting.popleft()
                yield first, future.result()
                in_flight -= first.size
        for first, future in waiting:
            yield first, future.result()


def _encode(tokenizer: Tokenizer, dtype: np.dtype, batch: Batch) -> list[NDArray[Any]]:
    encoded = tokenizer.encode_batch(batch.texts, batch.continued)
    try:
        return [np.array(ids, dtype=dtype) for ids in encoded]
    except OverflowError:
        largest = max(max(ids) for ids in encoded if ids)
        raise UserError(
            f"{tokenizer.folder}: token id {largest} does not fit {dtype.name}, chosen for {tokenizer.vocab_size} "
            "entries. Mend the tokenizer: ids must be below the number of its entries."
        ) from None


@contextmanager
def _read_ahead(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The same batches, made ahead of time by a thread; what it raises is raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(2)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def read() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again by the consumer
            put(error)

    def read_batches() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, name="reader", daemon=True)
    thread.start()
    try:
        yield read_batches()
    finally:
        stop.set()
        thread.join()
