"""Writes restarts.jsonl, one line for each start of a run, so that restarts can be counted and dated."""

from __future__ import annotations

import json
import os
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moh_megatron.monitor.records import read_records

_FILE = "restarts.jsonl"
_FORMER_FILE = "lives.jsonl"
"""The name of the file in run folders of earlier releases; it is read, never written."""
START_FILES = (_FORMER_FILE, _FILE)
"""The files with the records of starts, in the order in which they were written."""


def code_version() -> str:
    """What git calls the code that runs, else the version of the installed package."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--tags"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        described = None
    if described is not None and described.returncode == 0:
        return f"git {described.stdout.strip()}"
    try:
        return f"moh-megatron {version('moh-megatron')}"
    except PackageNotFoundError:
        return "unknown"


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The record of each start of a run, the first one included, in order."""
    return [record for name in START_FILES for record in read_records(run_dir / name)]


def record_start(run_dir: Path, start_step: int, **facts: Any) -> int:
    """Add a record of this start; returns how many there were before. Raises OSError."""
    earlier = len(read_starts(run_dir))
    record = {"step": start_step, "time": time.time(), "code": code_version(), **facts}
    with (run_dir / _FILE).open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":  # A run was killed while it wrote its record.
                stream.write(b"\n")
        stream.write(json.dumps(record).encode() + b"\n")
    return earlier
