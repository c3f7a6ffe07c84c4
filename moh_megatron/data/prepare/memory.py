"""Freed memory that the C library still holds."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed() -> None:
    """Give it back to the system, where the C library can: glibc, whose arenas otherwise grow by what lies between
    the blocks of several threads that come and go."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
