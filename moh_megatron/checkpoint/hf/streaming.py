"""Bounds what is held in memory of a tensor that is converted row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CHUNK_BYTES = 1 << 22
"""Held at once of a tensor that can be read in chunks of rows: small enough to stay in a processor's cache."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use the calling thread only: its helper threads would spin between chunks this small, on the cores
    that hash and write."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def row_ranges(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive ranges of rows, about CHUNK_BYTES each."""
    step = max(1, CHUNK_BYTES // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
