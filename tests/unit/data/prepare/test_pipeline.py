"""Tests that the bytes of a dataset are those of Megatron's writer, for shards, several processes and killed runs."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.corpora import write_jsonl

from moh_megatron.config.schema import Config
from moh_megatron.data.prepare import encode, inputs, part, workers
from moh_megatron.data.prepare.indexed_writer import Index
from moh_megatron.data.prepare.inputs import find_inputs
from moh_megatron.data.prepare.pipeline import prepare, prepare_shard, shard_tokenizer
from moh_megatron.data.prepare.working_folder import PrepareJob
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer

MakeConfig = Callable[..., Config]
REPOSITORY = Path(__file__).parents[4]
DATA = ("train.bin", "train.idx", "validation.bin", "validation.idx")
FRACTION = 0.3


@pytest.fixture
def documents(chapters: list[str]) -> list[str]:
    """Documents of many lengths, some empty, one of one token."""
    texts = [paragraph for chapter in chapters[:12] for paragraph in chapter.split("\n")]
    texts[5:5] = ["", "a", chapters[3], "", "\x00", "line\r\nline\r\n", "é\u0301 👩‍👩‍👧‍👦"]
    return texts


@pytest.fixture
def tokenizer_folder(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> Path:
    prepare(make_config([corpus], data={"dir": str(tmp_path / "first")}))
    return tmp_path / "first" / "tokenizer"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divides a small corpus into many parts and batches."""
    monkeypatch.setattr(inputs, "SMALLEST_PART", 20_000)
    monkeypatch.setattr(encode, "BATCH", 3_000)
    monkeypatch.setattr(encode, "IN_FLIGHT", 10_000)
    monkeypatch.setattr(part, "RECORDS_READ", 7)


def written_by_megatron(folder: Path, texts: list[str], tokenizer_folder: Path) -> dict[str, bytes]:
    """The files as Megatron-LM's preprocess tool writes them: a text without tokens gets no end-of-document token."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = load_tokenizer(tokenizer_folder)
    folder.mkdir()
    builders = {n: IndexedDatasetBuilder(str(folder / f"{n}.bin"), dtype=np.uint16) for n in ("train", "validation")}
    for text in texts:
        ids = tokenizer.encode(text)
        if ids:
            ids.append(tokenizer.eos_token_id)
        held = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < FRACTION * 2**64
        lengths = [len(ids)] if ids else []
        builders["validation" if held else "train"].add_document(ids, lengths)  # pyright: ignore[reportArgumentType]
    for name, builder in builders.items():
        builder.finalize(str(folder / f"{name}.idx"))
    return {name: (folder / name).read_bytes() for name in DATA}


@pytest.mark.usefixtures("small_parts")
def test_shards_and_processes_write_the_same_bytes_as_megatrons_writer(
    make_config: MakeConfig,
    documents: list[str],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = len(documents) // 2
    files = [write_jsonl(tmp_path / "a.jsonl", documents[:half]), write_jsonl(tmp_path / "b.jsonl", documents[half:])]
    expected = written_by_megatron(tmp_path / "megatron", documents, tokenizer_folder)

    def config(name: str, **data: object) -> Config:
        settings = {"dir": str(tmp_path / name), "validation_fraction": FRACTION, **data}
        return make_config(files, tokenizer={"path": str(tokenizer_folder)}, data=settings)

    def made(name: str) -> dict[str, bytes]:
        assert not (tmp_path / f"{name}.parts").exists()
        return {file: (tmp_path / name / file).read_bytes() for file in DATA}

    manifest = prepare(config("one", workers=1))
    assert made("one") == expected
    assert manifest.train.documents + manifest.validation.documents == len(documents) == manifest.counts.records
    assert manifest.counts.empty == 2
    for split in (manifest.train, manifest.validation):
        for record in split.files:
            assert record.sha256 == hashlib.sha256((tmp_path / "one" / record.path).read_bytes()).hexdigest()
    index = Index(tmp_path / "one" / "train")
    assert len(index.documents) == manifest.train.documents + 1
    assert int(index.lengths.sum()) == manifest.train.tokens

    for shards in (2, 4):
        for shard in range(shards, 0, -1):
            prepare_shard(config(f"shards{shards}"), shard, shards)
        with monkeypatch.context() as patched:
            patched.setattr(workers, "encode", None)  # nothing is left to encode
            prepare(config(f"shards{shards}"))
        assert made(f"shards{shards}") == expected
    monkeypatch.setattr(workers, "CORES_A_PROCESS", 1)
    prepare(config("processes", workers=2))
    assert made("processes") == expected


def test_shard_without_parts_keeps_the_folder_of_other_shards(
    chapters: list[str], tokenizer_folder: Path, tmp_path: Path, make_config: MakeConfig
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", chapters[:20])
    settings = {"dir": str(tmp_path / "data"), "ngram_baselines": False}
    config = make_config([text], tokenizer={"path": str(tokenizer_folder)}, data=settings)
    with PrepareJob(config, find_inputs(config.data.inputs), shard_tokenizer(config)) as other:
        # The other shard has not written anything yet.
        prepare_shard(config, 2, 2)
        assert other.folder.exists()
    assert not (tmp_path / "data.parts").exists()
    for shard in (1, 2):
        prepare_shard(config, shard, 2)
    prepare(config)
    # The dataset is complete now: the shard does nothing and leaves no folder.
    prepare_shard(config, 1, 2)
    assert not (tmp_path / "data.parts").exists()


KILLED = """
import sys
from moh_megatron.data.prepare import encode, inputs
inputs.SMALLEST_PART = 60_000
encode.BATCH = 20_000
encode.IN_FLIGHT = 40_000
from moh_megatron.commands import prepare_data
sys.argv[0] = "prepare_data.py"
sys.exit(prepare_data.run())
"""


def test_prepare_killed_at_any_moment_continues_with_the_same_bytes(
    chapters: list[str], tokenizer_folder: Path, tmp_path: Path
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", chapters)

    def start(name: str) -> subprocess.Popen[bytes]:
        overrides = [f"tokenizer.path={tokenizer_folder}", f"data.inputs=[{text}]", f"data.dir={tmp_path / name}"]
        arguments = [sys.executable, "-c", KILLED, "configs/smoke.yaml", *overrides, "data.ngram_baselines=false"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)

    started = time.monotonic()
    assert start("uninterrupted").wait() == 0
    duration = time.monotonic() - started
    generator = random.Random(0)
    finished: dict[str, int] = {}
    for _ in range(10):
        process = start("killed")
        # Half of the kills come in the last 70 % of the time, while the parts are made.
        time.sleep(duration * generator.choice([generator.uniform(0.3, 1), generator.uniform(0, 1)]))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        current = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("killed.parts/*/*.json")}
        if code == 0 or (tmp_path / "killed").exists():
            break
        assert finished.items() <= current.items(), "a finished part was made again"
        finished = current
    assert start("killed").wait() == 0
    for name in DATA:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()
    assert not list(tmp_path.glob("killed.parts")) + list(tmp_path.glob(".killed*"))
