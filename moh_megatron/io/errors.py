"""Defines the two exceptions that a command ends with on purpose."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """A mistake that the user can correct: a value, a missing file, a world size. Exit code 2, no traceback."""

    reported = False
    """Whether another process of the same run reports this error to the user."""


class Fault(RuntimeError):
    """A failure of the machine: a full disk, a broken checkpoint. Exit code 1, one message, no traceback."""


def refuse_differences(finding: str, saved: Mapping[str, Any], current: Mapping[str, Any], *remedy: str) -> None:
    """Raise UserError if a ``current`` value differs from the ``saved`` one; the message ends with the ``remedy``."""
    if differences := [
        f"  {key}: expected {saved.get(key)}, got {value}" for key, value in current.items() if saved.get(key) != value
    ]:
        raise UserError("\n".join([f"{finding}:", *differences, *remedy]))
