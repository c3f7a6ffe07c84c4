"""metrics.jsonl: one line a step, in order, however often a run is stopped and started again."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moh_megatron.io.errors import Fault
from moh_megatron.io.json_file import read_json, write_json


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line and its record; None where it is broken."""
    with path.open("rb") as stream:
        for line in stream:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            whole = isinstance(record, dict) and isinstance(record.get("step"), int)
            yield line, record if whole else None


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Those before the first broken one: what a crash left may be out of order."""
    for line, record in _lines(path):
        if record is None:
            return
        yield line, record


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """An OSError of a stream does not say which file it was; here it does. Fault where the file is there no more."""
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
    """Appends records to a file; what lies after ``start_step``, left by an earlier life of the run, is cut first."""

    def __init__(self, path: Path, start_step: int) -> None:
        if path.exists():
            kept = [line for line, record in _complete_lines(path) if record["step"] <= start_step]
            temporary = path.with_name(f".{path.name}")
            temporary.write_bytes(b"".join(kept))
            os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Append and flush. What JSON has no number for (NaN, infinity) becomes null.

        OSError names the file; a file that was deleted or moved, to which one can write for ever, is a Fault.
        """
        with naming(self._stream.name):
            if not os.path.samestat(os.stat(self._stream.name), os.fstat(self._stream.fileno())):
                raise FileNotFoundError
            self._stream.writelines(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)
            self._stream.flush()

    def close(self) -> None:
        with naming(self._stream.name):
            self._stream.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every whole record of a file, broken lines left out; none where there is no file."""
    return [record for _, record in _lines(path) if record is not None] if path.exists() else []


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_step(path: Path) -> int | None:
    """Step of the last whole record, or None."""
    steps = [record["step"] for _, record in _complete_lines(path)] if path.exists() else []
    return steps[-1] if steps else None


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a run's summary.json. Raises UserError where it is none."""
    return read_json(path, "the summary.json of a run", "Name the folder of a run that ended.")


def merge_summary(path: Path, values: dict[str, Any]) -> None:
    """Add ``values`` to a run's summary.json, which is replaced at once or not at all. Raises UserError."""
    write_json(path, read_summary(path) | values)


def write_exit(run_dir: Path, code: int, reason: str, step: int | None) -> None:
    """exit.json: how a run ended, for the one who starts it again; on a full disk it may be missing."""
    with contextlib.suppress(OSError):
        write_json(run_dir / "exit.json", {"code": code, "reason": reason, "step": step})
