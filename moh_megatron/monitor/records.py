"""Reads and writes the JSON files of a run: records with one line per step, the summary, and exit.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.json_file import read_json, write_json
from moh_megatron.io.printable import printable
from moh_megatron.io.small_file import open_regular

_WRITING = threading.RLock()
"""Held while records are written to a file."""
_LONGEST_WRITE_SECONDS = 5.0


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its record; None where the line is damaged. Raises UserError where it is no regular file."""
    with open_regular(path) as stream:
        for line in stream:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                record = None
            complete = isinstance(record, dict) and type(record.get("step")) is int
            yield line, record if complete else None


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines before the first damaged one: after a crash, those behind it may be out of order."""
    for line, record in _lines(path):
        if record is None:
            return
        yield line, record


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Add ``path`` to an OSError of the block, since errors of a stream do not name the file.

    Raises Fault where the file no longer exists.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Fault(
            f"{path} was deleted, moved or replaced while the run wrote to it. Put the run folder back, or set run.dir "
            f"to another one."
        ) from None
    except OSError as error:
        error.filename = path
        raise


class StepRecords:
    """Appends records to a file, after cutting off records of steps after ``start_step`` from before a restart."""

    def __init__(self, path: Path, start_step: int) -> None:
        if path.exists():
            kept = [line for line, record in _complete_lines(path) if record["step"] <= start_step]
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append and flush. NaN and infinity, which JSON does not have, become null.

        An OSError names the file. A file that was deleted or moved is a Fault: the system would accept writes to it.
        """
        with naming(self._stream.name), _WRITING:
            if not os.path.samestat(os.stat(self._stream.name), os.fstat(self._stream.fileno())):
                raise FileNotFoundError
            self._stream.writelines(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
            self._stream.flush()

    def close(self) -> None:
        with naming(self._stream.name):
            self._stream.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every record of a file, without damaged lines; empty where there is no file."""
    return [record for _, record in _lines(path) if record is not None] if path.exists() else []


def read_sound_records(path: Path, is_sound: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
    """Every record of a file for which ``is_sound``, and the number of the other lines.

    A last line without its end is not counted: a run may be writing it. A file that cannot be read counts as one line.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    try:
        for line, record in _lines(path):
            if record is not None and is_sound(record):
                records.append(record)
            else:
                damaged += line.endswith(b"\n")
    except FileNotFoundError:
        pass
    except (OSError, UserError):
        damaged += 1
    return records, damaged


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_step(path: Path) -> int | None:
    """The step of the last complete record, or None."""
    steps = [record["step"] for _, record in _complete_lines(path)] if path.exists() else []
    return steps[-1] if steps else None


def read_summary(path: Path) -> dict[str, Any]:
    """Read a run's summary.json. Raises UserError where it is not one."""
    return read_json(path, "the summary.json of a run", "Name the folder of a run that ended.")


def merge_summary(path: Path, values: dict[str, Any]) -> None:
    """Add ``values`` to a run's summary.json, which is replaced atomically. Raises UserError."""
    write_json(path, read_summary(path) | values)


HEAD_LOAD = "head_load.json"
"""The newest share of tokens that used each head, [L][N], and its step."""


def write_head_load(run_dir: Path, step: int, load: list[list[float]]) -> None:
    """Write ``head_load.json`` for reports; an error of the disk is ignored."""
    with contextlib.suppress(OSError):
        write_json(run_dir / HEAD_LOAD, {"step": step, "load": load})


def end_records() -> None:
    """Let no other thread of this process, which is about to end, write a record any more: ``last_step`` is the last.

    A disk that does not answer delays the end by a few seconds only.
    """
    _WRITING.acquire(timeout=_LONGEST_WRITE_SECONDS)


def write_exit(run_dir: Path, code: int, reason: str, step: int | None) -> None:
    """Write exit.json, which says how a run ended, if there is a folder ``run_dir``; an error of the disk is ignored.

    A folder that was moved away or deleted during the run is not made again.
    """
    with contextlib.suppress(OSError):
        if not run_dir.is_dir():
            return
        # The job scripts print the reason, and a message may name what came from outside.
        write_json(run_dir / "exit.json", {"code": code, "reason": printable(reason), "step": step})
