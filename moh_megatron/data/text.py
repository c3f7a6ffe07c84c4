"""Raw text: files and globs -> documents, streaming, with every fault of the input named by file and line.

Formats: ``.jsonl`` (one record a line, the text in one field) and ``.txt`` (a document is the file, a paragraph or a
line), each also with ``.gz``. Text is UTF-8; a byte order mark is dropped.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import DataConfig

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The input files, each once: in the order of the patterns, those of one glob sorted by name.

    Raises UserError for no pattern, a missing file, a glob that matches nothing, and a suffix no reader knows.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.exists(expanded):
            matches = [expanded]
        elif glob.has_magic(expanded):
            matches = sorted(glob.glob(expanded, recursive=True))
        else:
            raise UserError(f"data.inputs: {pattern} does not exist (working directory: {os.getcwd()}).")
        if not matches:
            raise UserError(f"data.inputs: no file matches {pattern} (working directory: {os.getcwd()}).")
        for match in matches:
            if os.path.isdir(match) or not match.endswith(SUFFIXES):
                kind = "a folder; name its files, for example" if os.path.isdir(match) else "not of a known kind:"
                hint = f"{match}/*.jsonl" if os.path.isdir(match) else ", ".join(SUFFIXES)
                raise UserError(f"data.inputs: {match} is {kind} {hint}.")
            found[Path(match)] = None
    if not found:
        raise UserError("data.inputs is empty; name the text to prepare, for example data.inputs=[corpus/*.jsonl.gz].")
    return list(found)


def read_documents(
    paths: Iterable[Path], data: DataConfig, advance: Callable[[int], object] = lambda count: None
) -> Iterator[str]:
    """The documents of all files in order. Records whose text is empty are passed over.

    ``advance`` is told how many bytes of the files on disk were read since its last call.
    Raises UserError, naming file and line, for anything that is not such text and for a file without any.
    """
    for path in paths:
        try:
            yield from _read_file(path, data, advance)
        except EOFError:
            raise UserError(f"{path}: the gzip stream is cut off. Copy or download the file again.") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: not a sound gzip file ({error}). Copy or download the file again.") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}).") from None


def _read_file(path: Path, data: DataConfig, advance: Callable[[int], object]) -> Iterator[str]:
    documents = 0
    reported = 0
    with open(path, "rb") as raw, gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
        for document in _documents(path, lines, data):
            yield document
            documents += 1
            advance(raw.tell() - reported)
            reported = raw.tell()
        advance(raw.tell() - reported)
    if not documents:
        raise UserError(f"{path}: holds no text. Remove it from data.inputs or fill it.")


def _decoded(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(line number from 1, line with its end)."""
    offset = 0
    for number, raw in enumerate(lines, start=1):
        start = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
        try:
            line = raw[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise UserError(
                f"{path}, line {number}: not UTF-8 (value 0x{raw[at]:02x} at byte {at + 1} of the line, "
                f"offset {offset + at} of the text). Convert the file, for example with iconv -t UTF-8."
            ) from None
        yield number, line
        offset += len(raw)


def _documents(path: Path, raw: Iterable[bytes], data: DataConfig) -> Iterator[str]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _records(path, raw, data.text_key)
    lines = (line for _, line in _decoded(path, raw))
    if data.text_unit == "file":
        return _whole(lines)
    return _blocks(lines) if data.text_unit == "paragraph" else _single(lines)


def _whole(lines: Iterator[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


def _single(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.strip():
            yield line.rstrip("\r\n")


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\r\n")
            block = []
    if block:
        yield "".join(block).rstrip("\r\n")


def _records(path: Path, raw: Iterable[bytes], text_key: str) -> Iterator[str]:
    for number, line in _decoded(path, raw):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}). Each line must be one JSON record.") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: expected a JSON object with the field {text_key!r}. Got {type(record).__name__}."
            )
        if text_key not in record:
            fields = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{where}: no field {text_key!r}; the record has {fields}. Set data.text_key.")
        text = record[text_key]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {text_key!r} must be a string. Got {type(text).__name__}.")
        # JSON can write half of a surrogate pair, which is no character and has no UTF-8.
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(
                f"{where}: field {text_key!r} holds a lone surrogate, which is no character. Mend the record."
            )
        if text:
            yield text
