"""A damaged file of the newest checkpoint: the run resumes from the one before, with a warning that says why."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import Run

from moh_megatron.config.load import load_config
from moh_megatron.train.resume import newest_good

DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "emptied": lambda content, draw: b"",
    "cut_by_a_byte": lambda content, draw: content[:-1],
    "cut_anywhere": lambda content, draw: content[: draw.randrange(len(content))],
    "first_bit": lambda content, draw: bytes([content[0] ^ 1]) + content[1:],
    "any_bit": lambda content, draw: flipped(content, draw.randrange(len(content)), 1 << draw.randrange(8)),
    "one_byte_more": lambda content, draw: content + b"\n",
    "deleted": lambda content, draw: None,
}


def flipped(content: bytes, position: int, bits: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_skipped_with_a_warning(
    uninterrupted: Run, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run, draw = tmp_path / "run", random.Random(damage)
    shutil.copytree(uninterrupted.folder / "checkpoints", run / "checkpoints")
    config = load_config(uninterrupted.folder / "config.yaml", [f"run.dir={run}"])
    newest, before = (run / "checkpoints" / f"step_000000{step}" for step in (30, 20))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    folders = {path.relative_to(newest).parts[0] for path in files}
    assert folders == {"config.yaml", "manifest.json", "manifest.sha256", "optimizer", "rng", "tokenizer", "weights"}
    for path in files:
        content = path.read_bytes()
        caplog.clear()
        assert newest_good(config) == newest
        damaged = DAMAGES[damage](content, draw)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert newest_good(config) == before, path
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.message.startswith(f"{newest} is passed over: ")
        assert path.name in record.message or path.name == "manifest.json"
        path.write_bytes(content)
