"""Which documents repeat an earlier one: exact, over 128-bit hashes, in bounded memory."""

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
_ENTRY = np.dtype([("hash", "<u8"), ("hash_low", "<u8"), ("place", "<i8")])


def mark_duplicates(records: Iterable[NDArray[Any]], documents: int, scratch: Path) -> NDArray[np.uint8]:
    """One byte a document, in order: 1 where an earlier document that is kept has the same hash.

    ``records`` are stretches of ``part.RECORD``, ``documents`` their number. Hashes go to files in ``scratch`` by their
    first bits, and one file is sorted at a time. The result is a mapped file there.

    Raises OSError where the disk fails.
    """
    with open(scratch / "duplicates", "wb") as file:  # all of it at once: a sparse file on a full disk is a bus error
        os.posix_fallocate(file.fileno(), 0, max(documents, 1))
    marks = np.memmap(scratch / "duplicates", dtype=np.uint8, mode="r+")
    buckets = min(MOST_BUCKETS, max(1, -(-documents * _ENTRY.itemsize // MEMORY)))
    paths = [scratch / f"hashes.{bucket}" for bucket in range(buckets)]
    files = [open(path, "wb") for path in paths]  # noqa: SIM115
    try:
        place = 0
        for stretch in records:
            entries = np.empty(len(stretch), _ENTRY)
            entries["hash"], entries["hash_low"] = stretch["hash"], stretch["hash_low"]
            entries["place"] = np.arange(place, place + len(stretch))
            place += len(stretch)
            entries = entries[stretch["dropped"] == 0]
            # The split uses the order of the hash; a bucket takes its lowest bits instead, or it would be uneven.
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
        entries = entries[np.lexsort((entries["place"], entries["hash_low"], entries["hash"]))]
        same = (entries["hash"][1:] == entries["hash"][:-1]) & (entries["hash_low"][1:] == entries["hash_low"][:-1])
        marks[entries["place"][1:][same]] = 1
        path.unlink()
    return marks
