"""Reads the documents of a segment as a stream; a bad record is rejected by its line, and its neighbours are kept.

Text is UTF-8; a byte order mark is dropped. A long document is never held in memory as one.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare import tables
from moh_megatron.data.prepare.chunks import Chunk, document_chunks, stream_chunks
from moh_megatron.data.prepare.inputs import JSON_LINES, Input, Segment
from moh_megatron.data.prepare.lines import Advance, Lines, opened
from moh_megatron.data.prepare.template import Template, text_template

BLOCK = 1 << 20
"""Bytes read at once."""
QUOTED_REJECTS = 5
"""How many rejects a message quotes."""


class Reject(NamedTuple):
    """A record that is no document; chunks of it that came before are void."""

    line: int
    """The line in the segment, from 1; for tables the row."""
    reason: str


class SegmentEnd(NamedTuple):
    """The end of a segment."""

    lines: int
    """The number of its lines; for tables of its rows."""


Event = Chunk | Reject | SegmentEnd


def read_segment(source: Input, segment: Segment, data: DataConfig, advance: Advance) -> Iterator[Event]:
    """The documents of ``segment`` in order, each as its chunks, between them the rejects; at the end one SegmentEnd.

    Records that begin in the segment belong to it. Empty texts are documents, blank lines are not. Raises UserError if
    the input cannot be read at all.
    """
    if source.kind != "text":
        yield from _table_events(source, segment, data, advance)
        return
    with opened(source.name, segment.start) as lines:
        reported = lines.on_disk()
        found = False
        for event in _text_events(source.name, lines, segment, data):
            found = True
            yield event
            if (position := lines.on_disk()) - reported >= BLOCK:
                advance(position - reported)
                reported = position
        if not found and segment.is_complete:
            yield Reject(1, "the file holds no text; remove it from data.inputs or fill it")
        advance(lines.on_disk() - reported)
        yield SegmentEnd(lines.number)


def _text_events(name: str, lines: Lines, segment: Segment, data: DataConfig) -> Iterator[Chunk | Reject]:
    if name.endswith(JSON_LINES):
        return _records(lines, segment.stop, data)
    match data.text_unit:
        case "file":
            return _text_document(lines, _blocks(lines), data)
        case "line":
            return _lines(lines, segment.stop, data)
        case "paragraph":
            return _paragraphs(lines, data)


def _records(lines: Lines, stop: int | None, data: DataConfig) -> Iterator[Chunk | Reject]:
    template, limit = text_template(data), data.max_record_bytes
    while (stop is None or lines.offset < stop) and (raw := lines.read(limit + 1)):
        line = lines.number
        if lines.inside and len(raw) > limit:
            size = len(raw) + lines.skip_line()
            yield Reject(line, f"a record of {size:,} bytes, more than data.max_record_bytes ({limit:,})")
            continue
        try:
            text = _without_byte_order_mark(lines, raw).decode("utf-8")
            record = json.loads(text) if text.strip() else None
        except UnicodeDecodeError as error:
            yield Reject(line, _not_utf8(lines, error))
        except (json.JSONDecodeError, RecursionError) as error:
            yield Reject(line, f"not JSON ({error}); each line must be one JSON record")
        except ValueError:  # JSON has no limit on the digits of an integer, Python has
            digits = sys.get_int_max_str_digits()
            yield Reject(line, f"an integer of more than {digits:,} digits, the most Python reads; write it as text")
        else:
            if text.strip():
                yield from _record(line, record, template, data)


def _record(line: int, record: Any, template: Template, data: DataConfig) -> Iterator[Chunk | Reject]:
    try:
        text = template.fill(record)
    except ValueError as error:
        yield Reject(line, str(error))
        return
    try:
        yield from document_chunks(text, data.max_document_bytes, data.normalization)
    except UnicodeEncodeError:  # JSON can express half of a surrogate pair, UTF-8 cannot
        yield Reject(line, f"{template.described} holds a lone surrogate, which is no character; fix the record")


def _table_events(source: Input, segment: Segment, data: DataConfig, advance: Advance) -> Iterator[Event]:
    template = text_template(data)
    if source.kind == "parquet":
        rows = tables.parquet_rows(source.name, segment.start, segment.stop, template.fields)
    elif source.kind == "saved":
        rows = tables.saved_row_range(source.name, segment.start, segment.stop, template.fields)
    else:
        rows = tables.hub_rows(source.name, source.revision, segment.start, segment.stop)
    line = 0
    for line, row in enumerate(rows, start=1):
        if isinstance(row, tables.BadRow):
            value = f"value 0x{row.error.object[row.error.start]:02x} at byte {row.error.start + 1}"
            yield Reject(line, f"field {row.field!r} is not UTF-8 ({value}); fix the record")
        else:
            yield from _record(line, row, template, data)
    if not line and segment.is_complete:
        yield Reject(1, "the table has no rows; remove it from data.inputs or fill it")
    advance(segment.bytes)
    yield SegmentEnd(line)


def _blocks(lines: Lines) -> Iterator[bytes]:
    while block := lines.block(BLOCK):
        yield block


def _lines(lines: Lines, stop: int | None, data: DataConfig) -> Iterator[Chunk | Reject]:
    while (stop is None or lines.offset < stop) and (raw := lines.read(BLOCK)):
        if lines.inside or not _blank(raw):
            yield from _text_document(lines, _line(lines, raw), data)


def _line(lines: Lines, raw: bytes) -> Iterator[bytes]:
    yield raw
    while lines.inside and (raw := lines.read(BLOCK)):
        yield raw


def _paragraphs(lines: Lines, data: DataConfig) -> Iterator[Chunk | Reject]:
    while raw := lines.read(BLOCK):
        if lines.inside or not _blank(raw):
            yield from _text_document(lines, _paragraph(lines, raw), data)


def _paragraph(lines: Lines, raw: bytes) -> Iterator[bytes]:
    while raw:
        yield from _line(lines, raw)
        raw = lines.read(BLOCK)
        if not lines.inside and _blank(raw):
            return


def _text_document(lines: Lines, raw: Iterator[bytes], data: DataConfig) -> Iterator[Chunk | Reject]:
    text = _decoded(lines, raw)
    if data.text_unit != "file":
        text = _without_line_end(text)
    first = True
    try:
        for chunk in stream_chunks(text, data.max_document_bytes, data.normalization):
            if not (first and chunk.last and (not chunk.text or chunk.text.isspace())):
                yield chunk
            first = False
    except _NotText as error:
        line = error.line
        for _ in raw:  # skip to the beginning of the next document
            pass
        yield Reject(line, str(error))


class _NotText(ValueError):
    """Bytes that are not UTF-8."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def _decoded(lines: Lines, raw: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in raw:
            yield decoder.decode(_without_byte_order_mark(lines, block))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        newlines = error.object.count(b"\n", error.start, len(error.object) - 1)
        raise _NotText(lines.number - newlines, _not_utf8(lines, error)) from None


def _without_line_end(texts: Iterator[str]) -> Iterator[str]:
    """The same text without the line ends at its end."""
    ends = ""
    for text in texts:
        text = ends + text
        body = text.rstrip("\r\n")
        ends = text[len(body) :]
        if body:
            yield body


def _without_byte_order_mark(lines: Lines, raw: bytes) -> bytes:
    at_start = lines.offset == len(raw)
    return raw[len(codecs.BOM_UTF8) :] if at_start and raw.startswith(codecs.BOM_UTF8) else raw


def _blank(line: bytes) -> bool:
    return not line or line.isspace() or (line.lstrip()[0] > 127 and line.decode("utf-8", "replace").isspace())


def _not_utf8(lines: Lines, error: UnicodeDecodeError) -> str:
    offset = lines.offset - (len(error.object) - error.start)
    line_end = error.object.rfind(b"\n", 0, error.start)
    byte = error.start - line_end if line_end >= 0 else offset - lines.begun + 1
    return (
        f"not UTF-8 (value 0x{error.object[error.start]:02x} at byte {byte} of the line, offset {offset} of the text); "
        "convert the file, for example with iconv -t UTF-8"
    )
