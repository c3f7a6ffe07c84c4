"""Whatever happens to a file of the newest checkpoint: the run goes on from the one before, and says why."""

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
    "gone": lambda content, draw: None,
}


def flipped(content: bytes, position: int, bits: int) -> bytes:
    return content[:position] + bytes([content[position] ^ bits]) + content[position + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_file_in_any_way(uninterrupted: Run, tmp_path: Path, damage: str) -> None:
    run, draw = tmp_path / "run", random.Random(damage)
    shutil.copytree(uninterrupted.folder / "checkpoints", run / "checkpoints")
    config = load_config(uninterrupted.folder / "config.yaml", [f"run.dir={run}"])
    newest, before = (run / "checkpoints" / f"step_000000{step}" for step in (30, 20))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    folders = {path.relative_to(newest).parts[0] for path in files}
    assert folders == {"config.yaml", "manifest.json", "manifest.sha256", "optimizer", "rng", "tokenizer", "weights"}
    for path in files:
        content, reports = path.read_bytes(), list[str]()
        assert newest_good(config, reports.append) == newest
        spoilt = DAMAGES[damage](content, draw)
        path.unlink() if spoilt is None else path.write_bytes(spoilt)
        assert newest_good(config, reports.append) == before, path
        assert len(reports) == 1
        assert reports[0].startswith(f"warning: {newest} is passed over: ")
        assert path.name in reports[0] or path.name == "manifest.json"
        path.write_bytes(content)
