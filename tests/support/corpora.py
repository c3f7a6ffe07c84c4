"""Writes small corpora."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write one record ``{"text": ...}`` for each text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
