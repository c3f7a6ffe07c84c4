"""The two kinds of failure a command may end with on purpose."""

from collections.abc import Mapping
from typing import Any


class UserError(ValueError):
    """Something the user can mend: a configuration value, a missing file, a world size. Exit code 2, no traceback."""

    reported = False
    """Whether another process of the same run reports this error to the user."""


class Fault(RuntimeError):
    """Something the machine did: a full disk, a broken checkpoint. Exit code 1, one message, no traceback."""


def refuse_differences(finding: str, there: Mapping[str, Any], here: Mapping[str, Any], *remedy: str) -> None:
    """Raise UserError where a value of ``here`` is another one ``there``; it ends with the ``remedy``."""
    pairs = {key: (there.get(key), value) for key, value in here.items()}
    if differences := [
        f"  {key}: {theirs} there, {ours} here" for key, (theirs, ours) in pairs.items() if theirs != ours
    ]:
        raise UserError("\n".join([f"{finding}:", *differences, *remedy]))
