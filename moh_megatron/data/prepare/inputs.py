"""Finds the inputs that data.inputs names and divides them into parts, independently of who will encode them.

Text is ``.jsonl`` (or ``.json``, also one record a line) and ``.txt``, each plain, ``.gz`` or ``.zst``. Tables are
``.parquet``, folders written by ``save_to_disk``, and ``hf:REPOSITORY[@REVISION][:SUBSET[:SPLIT]]`` for the Hugging
Face hub.
"""

from __future__ import annotations

import glob
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moh_megatron.config.examples import shipped_file
from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare import tables
from moh_megatron.data.prepare.tables import HUB
from moh_megatron.data.prepare.template import text_template
from moh_megatron.io.errors import UserError

JSON_LINES = tuple(f".{kind}{compression}" for kind in ("jsonl", "json") for compression in ("", ".gz", ".zst"))
"""Many corpora name JSON Lines ``.json``."""
PLAIN_JSON = (".jsonl", ".json")
SUFFIXES = (*JSON_LINES, ".txt", ".txt.gz", ".txt.zst", ".parquet")
SMALLEST_PART, LARGEST_PART, PARTS = 4_000_000, 256_000_000, 64
"""Bounds of a part, in bytes on disk; between them it is 1/PARTS of the corpus."""

Kind = Literal["text", "parquet", "saved", "hub"]


@dataclass(frozen=True)
class File:
    path: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Input:
    """A file, folder or hub dataset to read in order; messages call it by ``name``."""

    name: str
    kind: Kind
    files: tuple[File, ...]
    """Its files; none for a hub dataset."""
    revision: str | None = None
    """The commit of a hub dataset, if the hub answered."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Segment:
    """The range [start, stop) of an input, in bytes (text), row groups (parquet), rows (saved) or data files (hub)."""

    input: int
    """Index of the input."""
    start: int
    stop: int | None
    """None is the end of the input."""
    bytes: int
    """Approximate size on disk; 0 if unknown."""

    @property
    def is_complete(self) -> bool:
        """Whether this is all of the input."""
        return self.start == 0 and self.stop is None


Part = tuple[Segment, ...]


def find_inputs(patterns: Iterable[str]) -> list[Input]:
    """The inputs in the order of the patterns, those of one glob or folder sorted by name; none occurs twice.

    Raises UserError if there is no pattern, and for a missing file, a glob or folder with nothing to read, and an
    unknown suffix.
    """
    found: dict[str, Input] = {}
    for pattern in patterns:
        if not pattern:  # As a path it would be the working directory.
            raise UserError("data.inputs: must name files or folders. Got an empty text; take it out.")
        if pattern.startswith(HUB):
            found[pattern] = Input(pattern, "hub", (), tables.hub_revision(pattern))
            continue
        for path in _expand(str(shipped_file(os.path.expanduser(pattern)))):
            found[str(path)] = _input(path)
    if not found:
        raise UserError("data.inputs is empty; name the text to prepare, for example data.inputs=[corpus/*.jsonl.gz].")
    return list(found.values())


def plan_parts(inputs: list[Input], text_unit: str) -> list[Part]:
    """All inputs in order, divided into parts; the result depends on the inputs and data.text_unit alone.

    Large .jsonl (.json) and parquet files, saved datasets, and .txt files in which a document is a line are divided
    into segments. Small inputs share a part.
    """
    target = min(LARGEST_PART, max(SMALLEST_PART, sum(source.bytes for source in inputs) // PARTS))
    parts: list[Part] = []
    current: list[Segment] = []
    for segment in _segments(inputs, target, text_unit):
        alone = inputs[segment.input].kind == "hub"
        if current and (alone or sum(other.bytes for other in current) + segment.bytes > target):
            parts.append(tuple(current))
            current = []
        current.append(segment)
        if alone:
            parts.append(tuple(current))
            current = []
    if current:
        parts.append(tuple(current))
    return parts


def _segments(inputs: list[Input], target: int, text_unit: str) -> Iterator[Segment]:
    for index, source in enumerate(inputs):
        count = -(-source.bytes // target)
        match source.kind:
            case "text" if source.name.endswith(PLAIN_JSON) or (source.name.endswith(".txt") and text_unit == "line"):
                yield from _divide(index, source.bytes, count, source.bytes)
            case "parquet" if count > 1:
                yield from _divide(index, tables.row_groups(source.name), count, source.bytes)
            case "saved" if count > 1:
                yield from _divide(index, tables.saved_rows(source.name), count, source.bytes)
            case "hub":
                files = tables.hub_files(source.name, source.revision)
                yield from _divide(index, files, files, 0)
            case _:
                yield Segment(index, 0, None, source.bytes)


def most_documents(inputs: list[Input], part: Part, data: DataConfig) -> float:
    """An upper bound of the documents of a part, from its size alone; infinite for compressed text and tables."""
    return sum(_most_in_segment(inputs[segment.input], segment, data) for segment in part)


def _most_in_segment(source: Input, segment: Segment, data: DataConfig) -> float:
    if source.name.endswith(PLAIN_JSON):
        shortest = len(text_template(data).shortest_record) + 1
    elif source.name.endswith(".txt"):
        shortest = 2  # a character and a line end
    else:
        return math.inf
    stop = source.bytes if segment.stop is None else segment.stop
    return (stop - segment.start) // shortest + 1  # the last document may end after ``stop``


def _divide(source: int, length: int, count: int, size: int) -> Iterator[Segment]:
    """[0, length) of input number ``source`` in ``count`` nearly equal segments, but none is empty."""
    count = max(1, min(count, length))
    starts = [length * index // count for index in range(count)]
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        yield Segment(source, start, stop, size // count)


def _expand(pattern: str) -> list[Path]:
    if os.path.isdir(pattern) and not tables.is_saved(pattern):
        files = sorted(path for path in Path(pattern).rglob("*") if path.name.endswith(SUFFIXES) and _is_data(path))
        if not files:
            raise UserError(f"data.inputs: {pattern} is a folder without a file of a known kind: {_known_kinds()}.")
        return files
    if os.path.exists(pattern):
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        raise UserError(f"data.inputs: {pattern} does not exist (working directory: {os.getcwd()}).")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise UserError(f"data.inputs: no file matches {pattern} (working directory: {os.getcwd()}).")
    return [path for match in matches for path in ([Path(match)] if not os.path.isdir(match) else _expand(match))]


def _is_data(path: Path) -> bool:
    """Whether this is a file of data, and not one in which save_to_disk describes a dataset."""
    return path.is_file() and not (path.suffix == ".json" and tables.is_saved(path.parent))


def _input(path: Path) -> Input:
    try:
        if path.is_dir():
            return Input(str(path), "saved", tuple(_file(file) for file in tables.saved_files(path)))
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data.inputs: {path} is not of a known kind: {_known_kinds()}.")
        if not os.access(path, os.R_OK):
            raise UserError(f"data.inputs: {path} cannot be read (Permission denied). Change its permissions.")
        return Input(str(path), "parquet" if path.suffix == ".parquet" else "text", (_file(path),))
    except OSError as error:
        raise UserError(f"data.inputs: {path} cannot be read ({error.strerror}).") from None


def _file(path: Path) -> File:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # It can be read once only, and reading may never end.
        raise UserError(f"data.inputs: {path} must be a regular file. Got a pipe or a device; write a file.")
    return File(str(path), status.st_size, status.st_mtime_ns)


def _known_kinds() -> str:
    return ", ".join(SUFFIXES) + ", a folder written by save_to_disk, or hf:REPOSITORY"
