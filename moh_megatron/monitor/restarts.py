"""lives.jsonl: one line each time a run is started, so that restarts can be counted and dated."""

from __future__ import annotations

import json
import os
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moh_megatron.monitor.records import read_records


def code_version() -> str:
    """What git calls the code that runs, else the version of the installed package."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--tags"],
            cwd=here,
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


def record_start(path: Path, start_step: int, **facts: Any) -> int:
    """Add a line; returns how many there were before. Raises OSError."""
    earlier = len(read_records(path))
    life = {"step": start_step, "time": time.time(), "code": code_version(), **facts}
    with path.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read() != b"\n":  # a life was cut short while it wrote
                stream.write(b"\n")
        stream.write(json.dumps(life).encode() + b"\n")
    return earlier
