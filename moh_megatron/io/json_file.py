"""Reads JSON objects, with errors that say what was expected, and writes them atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import read_small_text


def read_json(path: Path, expected: str, remedy: str = "Fetch or write it again.") -> dict[str, Any]:
    """The JSON object in ``path``. Raises UserError, which ends with ``remedy``, unless it is what was ``expected``."""
    try:
        content = json.loads(read_small_text(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Expected {expected}. {remedy}") from None
    except UserError as error:
        raise UserError(f"{error} Expected {expected}. {remedy}") from None
    except (IsADirectoryError, PermissionError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Expected {expected}. {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be {expected}: a JSON object. Got {type(content).__name__}. {remedy}")
    return content


def read_json_if_any(path: Path, expected: str) -> dict[str, Any]:
    """As ``read_json``, but an empty object where ``path`` does not exist, not even as a broken link."""
    return read_json(path, expected) if os.path.lexists(path) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically; missing folders are created."""
    # A lone surrogate, which UTF-8 cannot encode, becomes the escape that JSON has for it.
    text = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text + b"\n")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
