"""Finds documents that repeat an earlier one, by their 128-bit hashes, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MEMORY = 1 << 26
"""Bytes of hashes sorted at once; sorting takes about as much again."""
MOST_BUCKETS = 512
_ENTRY = np.dtype([("hash", "<u8"), ("hash_low", "<u8"), ("index", "<i8")])


def mark_duplicates(records: Iterable[NDArray[Any]], documents: int, scratch: Path) -> NDArray[np.uint8]:
    """One byte for each document, in order: 1 if an earlier document that is kept has the same hash.

    ``records`` are arrays of ``part.RECORD``, ``documents`` is the number of records in all of them. The hashes are
    distributed over files in ``scratch``, and one file is sorted at a time. The result is a memory-mapped file there.

    Raises OSError if the disk fails.
    """
    with open(scratch / "duplicates", "wb") as file:  # allocated now: a sparse file on a full disk is a bus error
        os.posix_fallocate(file.fileno(), 0, max(documents, 1))
    marks = np.memmap(scratch / "duplicates", dtype=np.uint8, mode="r+")
    buckets = min(MOST_BUCKETS, max(1, -(-documents * _ENTRY.itemsize // MEMORY)))
    paths = [scratch / f"hashes.{bucket}" for bucket in range(buckets)]
    files = [open(path, "wb") for path in paths]  # noqa: SIM115
    try:
        start = 0
        for batch in records:
            entries = np.empty(len(batch), _ENTRY)
            entries["hash"], entries["hash_low"] = batch["hash"], batch["hash_low"]
            entries["index"] = np.arange(start, start + len(batch))
            start += len(batch)
            entries = entries[batch["dropped"] == 0]
            # The lowest bits choose the bucket: the highest ones decide the split and would fill the buckets unevenly.
            bucket = (entries["hash_low"] % np.uint64(buckets)).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            ends = np.cumsum(np.bincount(bucket, minlength=buckets))
            for file, chosen in zip(files, np.split(order, ends[:-1]), strict=True):
                file.write(entries[chosen].tobytes())
    finally:
        for file in files:
            file.close()
    for path in paths:
        entries = np.fromfile(path, dtype=_ENTRY)
        entries = entries[np.lexsort((entries["index"], entries["hash_low"], entries["hash"]))]
        same = (entries["hash"][1:] == entries["hash"][:-1]) & (entries["hash_low"][1:] == entries["hash_low"][:-1])
        marks[entries["index"][1:][same]] = 1
        path.unlink()
    return marks
