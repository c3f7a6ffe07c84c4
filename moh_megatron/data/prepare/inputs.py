"""data.inputs -> inputs -> parts: what there is to read, cut into work that does not depend on who does it.

Text: ``.jsonl`` (or ``.json``, one record a line too) and ``.txt``, plain, ``.gz`` or ``.zst``. Tables: ``.parquet``,
folders written by ``save_to_disk``, and ``hf:REPOSITORY[@REVISION][:SUBSET[:SPLIT]]`` for the Hugging Face hub.
"""

from __future__ import annotations

import glob
import math
import os
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
"""A part is at most 1/PARTS of the corpus, in bytes on disk, but not smaller or larger than these."""

Kind = Literal["text", "parquet", "saved", "hub"]


@dataclass(frozen=True)
class File:
    path: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Input:
    """One thing to read in order; its name is what messages call it."""

    name: str
    kind: Kind
    files: tuple[File, ...]
    """What it is made of; none for a hub dataset."""
    revision: str | None = None
    """The commit of a hub dataset, where the hub could be asked."""

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class Segment:
    """A stretch of an input. Unit of ``start`` and ``stop``: bytes (text), row groups (parquet), rows (saved), data
    files (hub). ``stop`` None: to the end."""

    input: int
    start: int
    stop: int | None
    bytes: int
    """On disk, roughly; 0 where nobody knows."""

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.stop is None


Part = tuple[Segment, ...]


def find_inputs(patterns: Iterable[str]) -> list[Input]:
    """The inputs, each once: in the order of the patterns, those of one glob or folder sorted by name.

    Raises UserError for no pattern, a missing file, a glob or folder with nothing to read, and an unknown suffix.
    """
    found: dict[str, Input] = {}
    for pattern in patterns:
        if pattern.startswith(HUB):
            found[pattern] = Input(pattern, "hub", (), tables.hub_revision(pattern))
            continue
        for path in _expand(str(shipped_file(os.path.expanduser(pattern)))):
            found[str(path)] = _input(path)
    if not found:
        raise UserError("data.inputs is empty; name the text to prepare, for example data.inputs=[corpus/*.jsonl.gz].")
    return list(found.values())


def plan_parts(inputs: list[Input], text_unit: str) -> list[Part]:
    """All of the inputs, in order, as parts; a function of the inputs and data.text_unit alone.

    Large .jsonl (.json) and parquet files and saved datasets are cut, and .txt where a document is a line; the rest is
    not. Small ones go together.
    """
    target = min(LARGEST_PART, max(SMALLEST_PART, sum(each.bytes for each in inputs) // PARTS))
    parts: list[Part] = []
    gathered: list[Segment] = []
    for segment in _segments(inputs, target, text_unit):
        alone = inputs[segment.input].kind == "hub"
        if gathered and (alone or sum(each.bytes for each in gathered) + segment.bytes > target):
            parts.append(tuple(gathered))
            gathered = []
        gathered.append(segment)
        if alone:
            parts.append(tuple(gathered))
            gathered = []
    if gathered:
        parts.append(tuple(gathered))
    return parts


def _segments(inputs: list[Input], target: int, text_unit: str) -> Iterator[Segment]:
    for number, each in enumerate(inputs):
        count = -(-each.bytes // target)
        match each.kind:
            case "text" if each.name.endswith(PLAIN_JSON) or (each.name.endswith(".txt") and text_unit == "line"):
                yield from _cut(number, each.bytes, count, each.bytes)
            case "parquet" if count > 1:
                yield from _cut(number, tables.row_groups(each.name), count, each.bytes)
            case "saved" if count > 1:
                yield from _cut(number, tables.saved_rows(each.name), count, each.bytes)
            case "hub":
                files = tables.hub_files(each.name, each.revision)
                yield from _cut(number, files, files, 0)
            case _:
                yield Segment(number, 0, None, each.bytes)


def most_documents(inputs: list[Input], part: Part, data: DataConfig) -> float:
    """No fewer than the documents of a part, from its size alone; infinite where the size says nothing (compressed)."""
    return sum(_most(inputs[segment.input], segment, data) for segment in part)


def _most(source: Input, segment: Segment, data: DataConfig) -> float:
    if source.name.endswith(PLAIN_JSON):
        least = len(text_template(data).shortest_record) + 1
    elif source.name.endswith(".txt"):
        least = 2  # a character and a line end
    else:
        return math.inf
    stop = source.bytes if segment.stop is None else segment.stop
    return (stop - segment.start) // least + 1  # what begins before ``stop`` may end behind it


def _cut(number: int, length: int, count: int, size: int) -> Iterator[Segment]:
    """[0, length) in ``count`` nearly equal stretches, or as many as there are units."""
    count = max(1, min(count, length))
    borders = [length * index // count for index in range(count)]
    for start, stop in zip(borders, [*borders[1:], None], strict=True):
        yield Segment(number, start, stop, size // count)


def _expand(pattern: str) -> list[Path]:
    if os.path.isdir(pattern) and not tables.is_saved(pattern):
        inside = sorted(path for path in Path(pattern).rglob("*") if path.name.endswith(SUFFIXES) and _is_data(path))
        if not inside:
            raise UserError(f"data.inputs: {pattern} is a folder without a file of a known kind: {_known()}.")
        return inside
    if os.path.exists(pattern):
        return [Path(pattern)]
    if not glob.has_magic(pattern):
        raise UserError(f"data.inputs: {pattern} does not exist (working directory: {os.getcwd()}).")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise UserError(f"data.inputs: no file matches {pattern} (working directory: {os.getcwd()}).")
    return [path for match in matches for path in ([Path(match)] if not os.path.isdir(match) else _expand(match))]


def _is_data(path: Path) -> bool:
    """Whether this is a file, and not one of those in which save_to_disk describes a dataset."""
    return path.is_file() and not (path.suffix == ".json" and tables.is_saved(path.parent))


def _input(path: Path) -> Input:
    try:
        if path.is_dir():
            return Input(str(path), "saved", tuple(_file(file) for file in tables.saved_files(path)))
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"data.inputs: {path} is not of a known kind: {_known()}.")
        if not os.access(path, os.R_OK):
            raise UserError(f"data.inputs: {path} cannot be read (Permission denied). Change its permissions.")
        return Input(str(path), "parquet" if path.suffix == ".parquet" else "text", (_file(path),))
    except OSError as error:
        raise UserError(f"data.inputs: {path} cannot be read ({error.strerror}).") from None


def _file(path: Path) -> File:
    status = path.stat()
    return File(str(path), status.st_size, status.st_mtime_ns)


def _known() -> str:
    return ", ".join(SUFFIXES) + ", a folder written by save_to_disk, or hf:REPOSITORY"
