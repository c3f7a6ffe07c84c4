"""Making a tokenizer shows what it does: how much of the sample is read, then how long it learns."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.corpora import write_jsonl

from moh_megatron.config.schema import Config, DataConfig
from moh_megatron.data.prepare import inputs
from moh_megatron.data.prepare.inputs import find_inputs, plan_parts
from moh_megatron.data.prepare.make_tokenizer import sample_texts
from moh_megatron.data.prepare.pipeline import prepare_tokenizer
from moh_megatron.io.console import console_logging

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("algorithm", ["sentencepiece_bpe", "sentencepiece_unigram", "byte_level_bpe", "grown"])
def test_making_a_tokenizer_shows_each_stage(
    algorithm: str, make_config: MakeConfig, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = 400
    if algorithm == "grown":
        prepare_tokenizer(make_config([corpus]), tmp_path / "base")
        settings, entries = {"path": str(tmp_path / "base"), "grow_to": 420}, 420
    else:
        settings = {"algorithm": algorithm}
    capsys.readouterr()
    with console_logging():
        prepare_tokenizer(make_config([corpus], tokenizer=settings), tmp_path / "made")
    shown = re.split(r"[\r\n]+", capsys.readouterr().err)
    stages = (
        f"making a tokenizer of {entries} entries from data.inputs",
        "read text for the tokenizer:   0%",
        "read text for the tokenizer: 100%",
        f"learn the {entries} entries of the tokenizer: ",
    )
    places = [[number for number, line in enumerate(shown) if line.startswith(stage)] for stage in stages]
    assert all(places), shown
    assert [found[0] for found in places] == sorted(found[0] for found in places)
    learning = places[-1]
    assert shown[learning[0]].endswith("so far")
    assert not shown[learning[-1]].endswith("so far")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("most_bytes", [3_000, 1 << 30])
def test_progress_of_a_sample_grows_with_each_text_and_ends_at_its_goal(
    compressed: bool, most_bytes: int, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goal is the smaller of the sample and what is on disk, whatever the format makes of it."""
    monkeypatch.setattr(inputs, "SMALLEST_PART", 2_000)
    files = [write_jsonl(tmp_path / f"{number}.jsonl", paragraphs) for number in range(2)]
    if compressed:
        for file in files:
            file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    found = find_inputs([str(tmp_path / ("*.jsonl.gz" if compressed else "*.jsonl"))])
    plan = plan_parts(found, "file")
    steps: list[int] = []
    texts = list(sample_texts(found, plan, DataConfig(inputs=("unused",)), most_bytes, steps.append))
    on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert min(steps) >= 0
    # A part's share is rounded down.
    assert min(most_bytes, on_disk) - len(plan) <= sum(steps) <= min(most_bytes, on_disk)
    assert max(steps) < sum(steps)
    assert len([total for total in itertools.accumulate(steps) if total]) > len(texts) // 2
    if most_bytes > on_disk:
        assert texts == 2 * paragraphs
    else:
        assert json.dumps(texts) != json.dumps(2 * paragraphs)
