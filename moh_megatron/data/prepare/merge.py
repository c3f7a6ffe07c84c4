"""Finished parts -> the two splits, streaming: what is kept, which split it goes to, in the order of the inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moh_megatron.data.dataset_manifest import SPLITS, Counts, FileRecord, SplitRecord
from moh_megatron.data.prepare.duplicates import mark_duplicates
from moh_megatron.data.prepare.indexed_writer import LONGEST, Writer
from moh_megatron.data.prepare.inputs import Input, Part
from moh_megatron.data.prepare.part import LONG, SHORT, PartFiles
from moh_megatron.io.errors import UserError

COPIED = 1 << 22
_NOWHERE = len(SPLITS)


@dataclass(frozen=True)
class Merged:
    train: SplitRecord
    validation: SplitRecord
    counts: Counts


def held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Whether each document is for validation: by the first 8 bytes of the sha256 of its text alone, so that a growing
    corpus moves none."""
    return hashes < np.uint64(math.ceil(fraction * 2**64))


def merge_parts(
    parts: Sequence[PartFiles],
    folder: Path,
    dtype: Any,
    *,
    validation_fraction: float,
    deduplicate: bool,
    advance: Callable[[int], object],
) -> Merged:
    """Write train and validation .bin and .idx into ``folder``. ``advance`` is told of finished parts.

    Memory does not depend on the corpus. Raises UserError for a document too long for the format.
    """
    summaries = [part.summary() for part in parts]
    documents = sum(summary.documents for summary in summaries if summary)
    marks = None
    if deduplicate:
        marks = mark_duplicates((records for part in parts for records in part.records()), documents, folder)
    writers = [Writer(folder / name, dtype) for name in SPLITS]
    text_bytes = [0, 0]
    removed = {"too_short": 0, "too_long": 0, "duplicates": 0, "empty": 0}
    place = 0
    try:
        for part in parts:
            with open(part.path("tokens"), "rb") as tokens:
                for records in part.records():
                    goes = np.where(held_out(records["hash"], validation_fraction), 1, 0)
                    goes[records["dropped"] > 0] = _NOWHERE
                    if marks is not None:
                        repeated = marks[place : place + len(records)] > 0
                        goes[repeated] = _NOWHERE
                        removed["duplicates"] += int(repeated.sum())
                    place += len(records)
                    removed["too_short"] += int((records["dropped"] == SHORT).sum())
                    removed["too_long"] += int((records["dropped"] == LONG).sum())
                    for split, writer in enumerate(writers):
                        chosen = records[goes == split]
                        if len(chosen) and (longest := int(chosen["tokens"].max())) > LONGEST:
                            raise UserError(
                                f"A document has {longest:,} tokens; Megatron's format holds at most {LONGEST:,} in "
                                "one. Cut it, or set data.text_unit to paragraph or line."
                            )
                        writer.add_documents(chosen["tokens"])
                        text_bytes[split] += int(chosen["bytes"].sum())
                        removed["empty"] += int((chosen["tokens"] == 0).sum())
                    _copy(tokens, records["tokens"] * np.dtype(dtype).itemsize, goes, writers)
            advance(1)
        finished = [writer.finish() for writer in writers]
    finally:
        for writer in writers:
            writer.close()
        if marks is not None:
            del marks
            (folder / "duplicates").unlink()
    splits = [
        SplitRecord(
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=text_bytes[split],
            files=tuple(
                FileRecord(f"{name}.{end}", (folder / f"{name}.{end}").stat().st_size, sha256)
                for end, sha256 in zip(("bin", "idx"), finished[split], strict=True)
            ),
        )
        for split, (name, writer) in enumerate(zip(SPLITS, writers, strict=True))
    ]
    in_pieces = sum(summary.in_pieces for summary in summaries if summary)
    rejects = sum(summary.rejects for summary in summaries if summary)
    return Merged(
        splits[0], splits[1], Counts(records=documents + rejects, rejects=rejects, in_pieces=in_pieces, **removed)
    )


def _copy(tokens: IO[bytes], sizes: NDArray[np.int64], goes: NDArray[Any], writers: list[Writer]) -> None:
    """Copy the next documents of ``tokens``, of so many bytes each, to where they go; neighbours together."""
    if not len(sizes):
        return
    starts = np.concatenate([[0], np.flatnonzero(np.diff(goes)) + 1])
    runs = np.add.reduceat(sizes, starts)
    for split, left in zip(goes[starts].tolist(), runs.tolist(), strict=True):
        if split == _NOWHERE:
            tokens.seek(left, 1)
            continue
        while left:
            data = tokens.read(min(left, COPIED))
            assert data, "a part's tokens end early"
            writers[split].add_tokens(data)
            left -= len(data)


def all_rejects(parts: Sequence[PartFiles], plan: Sequence[Part], inputs: Sequence[Input]) -> Iterator[dict[str, Any]]:
    """Every reject in order: ``file``, ``line`` from 1 (a row for tables), ``reason``."""
    offsets: dict[int, int] = {}
    for files, part in zip(parts, plan, strict=True):
        summary = files.summary()
        if summary is None:  # of another shard, not there yet
            return
        before = []
        for segment, lines in zip(part, summary.lines, strict=True):
            before.append(offsets.get(segment.input, 0))
            offsets[segment.input] = before[-1] + lines
        for reject in files.rejects():
            place = reject["segment"]
            yield {
                "file": inputs[part[place].input].name,
                "line": before[place] + reject["line"],
                "reason": reject["reason"],
            }


def write_rejects(path: Path, rejects: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for reject in rejects:
            file.write(json.dumps(reject, ensure_ascii=False) + "\n")
