"""Merges finished parts into the two splits as a stream, in the order of the inputs, and decides what is kept."""

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
from moh_megatron.data.prepare.indexed_writer import LONGEST, IndexedWriter
from moh_megatron.data.prepare.inputs import Input, Part
from moh_megatron.data.prepare.part import LONG, SHORT, PartFiles
from moh_megatron.io.errors import UserError

COPY_SIZE = 1 << 22
"""Bytes copied at once."""
_LEFT_OUT = len(SPLITS)


@dataclass(frozen=True)
class Merged:
    train: SplitRecord
    validation: SplitRecord
    counts: Counts


def held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Whether each document is for validation.

    The first 8 bytes of the sha256 of its text alone decide, so that documents keep their split as the corpus grows.
    """
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
    """Write train and validation .bin and .idx into ``folder``, calling ``advance`` with 1 after each part.

    The memory needed does not depend on the corpus. Raises UserError for a document too long for the format.
    """
    summaries = [part.summary() for part in parts]
    documents = sum(summary.documents for summary in summaries if summary)
    marks = None
    if deduplicate:
        marks = mark_duplicates((records for part in parts for records in part.records()), documents, folder)
    writers = [IndexedWriter(folder / name, dtype) for name in SPLITS]
    text_bytes = [0, 0]
    removed = {"too_short": 0, "too_long": 0, "duplicates": 0, "empty": 0}
    start = 0
    try:
        for part in parts:
            with open(part.path("tokens"), "rb") as tokens:
                for records in part.records():
                    splits = np.where(held_out(records["hash"], validation_fraction), 1, 0)
                    splits[records["dropped"] > 0] = _LEFT_OUT
                    if marks is not None:
                        repeated = marks[start : start + len(records)] > 0
                        splits[repeated] = _LEFT_OUT
                        removed["duplicates"] += int(repeated.sum())
                    start += len(records)
                    removed["too_short"] += int((records["dropped"] == SHORT).sum())
                    removed["too_long"] += int((records["dropped"] == LONG).sum())
                    for split, writer in enumerate(writers):
                        chosen = records[splits == split]
                        if len(chosen) and (longest := int(chosen["tokens"].max())) > LONGEST:
                            raise UserError(
                                f"A document has {longest:,} tokens; Megatron's format holds at most {LONGEST:,} in "
                                "one. Cut it, or set data.text_unit to paragraph or line."
                            )
                        writer.add_documents(chosen["tokens"])
                        text_bytes[split] += int(chosen["bytes"].sum())
                        removed["empty"] += int((chosen["tokens"] == 0).sum())
                    _copy(tokens, records["tokens"] * np.dtype(dtype).itemsize, splits, writers)
            advance(1)
        finished = [writer.finish() for writer in writers]
    finally:
        for writer in writers:
            writer.close()
        if marks is not None:
            del marks
            (folder / "duplicates").unlink()
    split_records = [
        SplitRecord(
            documents=writer.documents,
            tokens=writer.tokens,
            text_bytes=text_bytes[split],
            files=tuple(
                FileRecord(f"{name}.{suffix}", (folder / f"{name}.{suffix}").stat().st_size, sha256)
                for suffix, sha256 in zip(("bin", "idx"), finished[split], strict=True)
            ),
        )
        for split, (name, writer) in enumerate(zip(SPLITS, writers, strict=True))
    ]
    in_pieces = sum(summary.in_pieces for summary in summaries if summary)
    rejects = sum(summary.rejects for summary in summaries if summary)
    counts = Counts(records=documents + rejects, rejects=rejects, in_pieces=in_pieces, **removed)
    return Merged(split_records[0], split_records[1], counts)


def _copy(tokens: IO[bytes], sizes: NDArray[np.int64], splits: NDArray[Any], writers: list[IndexedWriter]) -> None:
    """Copy the next documents of ``tokens`` to their ``splits``, those next to each other together.

    ``sizes`` are their bytes.
    """
    if not len(sizes):
        return
    starts = np.concatenate([[0], np.flatnonzero(np.diff(splits)) + 1])
    chunk_sizes = np.add.reduceat(sizes, starts)
    for split, left in zip(splits[starts].tolist(), chunk_sizes.tolist(), strict=True):
        if split == _LEFT_OUT:
            tokens.seek(left, 1)
            continue
        while left:
            data = tokens.read(min(left, COPY_SIZE))
            assert data, "a part's tokens end early"
            writers[split].add_tokens(data)
            left -= len(data)


def all_rejects(parts: Sequence[PartFiles], plan: Sequence[Part], inputs: Sequence[Input]) -> Iterator[dict[str, Any]]:
    """Every reject in order: its ``file``, its ``line`` (for tables the row) from 1, and the ``reason``."""
    lines_before: dict[int, int] = {}
    for files, part in zip(parts, plan, strict=True):
        summary = files.summary()
        if summary is None:  # another shard has not finished it yet
            return
        offsets = []
        for segment, lines in zip(part, summary.lines, strict=True):
            offsets.append(lines_before.get(segment.input, 0))
            lines_before[segment.input] = offsets[-1] + lines
        for reject in files.rejects():
            index = reject["segment"]
            yield {
                "file": inputs[part[index].input].name,
                "line": offsets[index] + reject["line"],
                "reason": reject["reason"],
            }


def write_rejects(path: Path, rejects: Iterator[dict[str, Any]]) -> None:
    """Write rejects.jsonl."""
    with open(path, "w", encoding="utf-8") as file:
        for reject in rejects:
            file.write(json.dumps(reject, ensure_ascii=False) + "\n")
