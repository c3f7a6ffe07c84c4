"""A small prepared dataset and runs over it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.runs import SMALL, Run, command, finish


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, prepared dataset): sentences of a small made-up language."""
    folder = tmp_path_factory.mktemp("prepared")
    draw = random.Random(0)
    syllables = ["ka", "lo", "mi", "ter", "an", "su", "ve", "ro", "pin", "da", "the", "or"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(200):
            text = " ".join(draw.choices(words, k=draw.randint(20, 80))) + "."
            stream.write(json.dumps({"text": text}) + "\n")
    config = folder / "small.yaml"
    values = {**SMALL, "run": {"dir": str(folder / "unused")}}
    values["data"] = {**SMALL["data"], "inputs": [str(folder / "text.jsonl")]}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = finish(command("prepare_data.py", config, f"data.dir={folder / 'data'}"))
    assert done.returncode == 0, done.stderr
    return config, folder / "data"


@pytest.fixture(scope="session")
def new_run(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    """Makes a run with a folder of its own."""
    config, data = prepared
    return lambda: Run(config, data, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def uninterrupted(new_run: Callable[[], Run]) -> Run:
    """A run that nothing disturbed."""
    run = new_run()
    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return run
