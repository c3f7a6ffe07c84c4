import fcntl
import gzip
import hashlib
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moh_megatron.config.schema import Config
from moh_megatron.data.dataset_manifest import load_dataset_tokenizer, load_manifest
from moh_megatron.data.prepare import enough_text, tables, workers
from moh_megatron.data.prepare.inputs import find_inputs, plan_parts
from moh_megatron.data.prepare.merge import held_out
from moh_megatron.data.prepare.pipeline import prepare
from moh_megatron.data.prepare.read_documents import read_segment
from moh_megatron.data.prepare.working_folder import PrepareJob
from moh_megatron.io.errors import Fault, UserError

MakeConfig = Callable[..., Config]


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def is_held_out(text: str, fraction: float) -> bool:
    """The rule of the split: the first 8 bytes of the sha256 of the text alone."""
    return hash_of(text) < fraction * 2**64


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file by its path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_documents_are_stored_in_their_split(make_config: MakeConfig, corpus: Path, paragraphs: list[str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    config = make_config([corpus], data={"ngram_baselines": True})
    manifest = prepare(config)
    folder = Path(str(config.data.dir))
    assert load_manifest(folder) == manifest
    tokenizer = load_dataset_tokenizer(folder, manifest)
    for name, held in (("train", False), ("validation", True)):
        expected = [text for text in paragraphs if is_held_out(text, 0.3) == held]
        stored = IndexedDataset(str(folder / name))
        documents: Any = stored[:]
        record = manifest.split(name)
        assert [tokenizer.decode(ids[:-1].tolist()) for ids in documents] == expected
        assert all(ids[-1] == tokenizer.eos_token_id for ids in documents)
        assert stored.index.dtype.__name__ == manifest.dtype == "uint16"
        assert record.documents == len(expected) > 3
        assert record.tokens == sum(map(len, documents))
        assert record.text_bytes == sum(len(text.encode()) for text in expected)
    assert manifest.baselines is not None
    assert 0 < manifest.baselines["bigram_entropy"] < manifest.baselines["unigram_entropy"] < 5.99  # log(400)
    assert f"{manifest.train.tokens:,} tokens" in manifest.summary()
    counts = manifest.baselines
    assert (
        f"counts: single tokens {counts['unigram_entropy']:.4f}, pairs of tokens {counts['bigram_entropy']:.4f}"
        in manifest.summary()
    )


def test_split_of_a_document_depends_on_its_text_alone(chapters: list[str]) -> None:
    texts = [paragraph for chapter in chapters[:40] for paragraph in chapter.split("\n")]
    hashes = np.array([hash_of(text) for text in texts], dtype=np.uint64)
    held = held_out(hashes, 0.1)
    assert held.tolist() == [is_held_out(text, 0.1) for text in texts]
    assert held.mean() == pytest.approx(0.1, abs=0.03)
    assert held_out(hashes, 0.2)[held].all()
    assert not held_out(hashes, 0.0).any()


def test_prepare_again_makes_only_what_has_changed(
    make_config: MakeConfig, corpus: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = make_config([corpus])
    first = prepare(config)
    dataset = Path(str(config.data.dir))
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    with caplog.at_level(logging.INFO):
        assert prepare(config) == first
    assert any("already prepared" in message for message in caplog.messages)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before

    damaged = dataset / "train.bin"
    content = contents(dataset)
    damaged.write_bytes(damaged.read_bytes()[:-2])
    with pytest.raises(
        UserError, match=r"train\.bin: expected \d+ bytes, but it has \d+\. Run moh-prepare CONFIG again"
    ):
        load_manifest(dataset)
    prepare(config)
    assert contents(dataset) == content

    corpus.write_text(corpus.read_text(encoding="utf-8") * 2, encoding="utf-8")
    assert prepare(config).train.documents == 2 * first.train.documents
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_given_tokenizer_is_copied_into_the_dataset(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    own = make_config([corpus])
    trained = prepare(own)
    tokenizer = Path(str(own.data.dir)) / "tokenizer"
    config = make_config([corpus], data={"dir": str(tmp_path / "other")}, tokenizer={"path": str(tokenizer)})
    manifest = prepare(config)
    assert manifest.tokenizer == trained.tokenizer
    assert contents(tmp_path / "other" / "tokenizer") == contents(tokenizer)
    assert manifest.train.files == trained.train.files
    with pytest.raises(UserError, match=r"has 400 entries, more than model\.vocab_size \(399\)"):
        prepare(make_config([corpus], vocab_size=399, tokenizer={"path": str(tokenizer)}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"validation_fraction": 1e-9}}, "No document was assigned to the validation split.*Raise"),
        ({"data": {"validation_fraction": 0.9999}}, "No document was assigned to the train split.*Lower"),
        ({"train": {"sequence_length": 100000}}, r"validation text has at most \d+ tokens, .*at least 100001"),
        ({"vocab_size": 60000}, r"model\.vocab_size is 60000, more than"),
    ],
)
def test_corpus_that_does_not_fit_the_model_is_refused_and_leaves_no_files(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, sections: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(make_config([corpus], **sections))
    assert [path.name for path in tmp_path.iterdir()] == [corpus.name]


def refuse_call(*unused: object) -> None:
    pytest.fail("this comes after the check of the sizes")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"validation_fraction": 1e-9}}, "No document was assigned to the validation split: the text has 40"),
        ({"data": {"validation_fraction": 0.9999}}, "No document was assigned to the train split: the text has 40"),
        ({"train": {"sequence_length": 10**7}}, r"The train text has at most \d+ tokens, .*at least 10000001"),
    ],
)
def test_text_that_is_certainly_too_little_is_refused_before_a_tokenizer_is_trained(
    make_config: MakeConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch, sections: dict, message: str
) -> None:
    monkeypatch.setattr(PrepareJob, "tokenizer", refuse_call)
    with pytest.raises(UserError, match=message):
        prepare(make_config([corpus], **sections))


def test_too_little_validation_text_is_refused_before_anything_is_encoded(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(make_config([corpus]))
    tokens = manifest.validation.tokens
    monkeypatch.setattr(PrepareJob, "make_parts", refuse_call)
    for given in (None, str(tmp_path / "dataset" / "tokenizer")):
        config = make_config(
            [corpus],
            data={"dir": str(tmp_path / "other")},
            train={"sequence_length": tokens},
            tokenizer={"path": given},
        )
        with pytest.raises(UserError, match=rf"The validation text has {tokens} tokens, .*: at least {tokens + 1} "):
            prepare(config)
    monkeypatch.undo()
    assert prepare(replace(config, train=replace(config.train, sequence_length=tokens - 1))).validation.tokens == tokens


def test_reading_for_the_check_of_the_sizes_ends_when_there_is_enough(
    make_config: MakeConfig, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    def counted(*arguments: Any) -> Any:
        for event in read_segment(*arguments):
            read.append(event)
            yield event

    monkeypatch.setattr(enough_text, "read_segment", counted)
    config = make_config([corpus])
    inputs = find_inputs(config.data.inputs)
    enough_text.check_enough_text(config, inputs, plan_parts(inputs, "file"), None)
    assert 2 <= len(read) < 40


def test_full_disk_keeps_the_earlier_dataset(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    config = make_config([corpus])
    prepare(config)
    content = contents(tmp_path / "dataset")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(Fault, match=r"dataset.*: could not be written \(.*File too large.*data\.dir"):
            prepare(make_config([corpus], vocab_size=410))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "dataset") == content
    assert {path.name for path in tmp_path.iterdir()} == {corpus.name, "dataset"}


def test_input_that_changes_during_the_run_is_refused(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, size = workers.encode, corpus.stat().st_size

    def encode_while_another_writes(*arguments: Any) -> None:
        encode(*arguments)
        with open(corpus, "a") as file:
            file.write('{"text": "more"}\n')

    with monkeypatch.context() as patched:
        patched.setattr(workers, "encode", encode_while_another_writes)
        with pytest.raises(UserError, match=rf"changed while it was read: {size:,} bytes when .*, {size + 17:,} now"):
            prepare(make_config([corpus]))
    assert [path.name for path in tmp_path.iterdir()] == [corpus.name]
    assert prepare(make_config([corpus])).inputs[0].bytes == size + 17


def test_failure_before_any_part_is_finished_leaves_no_files(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    prepare(make_config([corpus]))
    (tmp_path / "dataset").rename(tmp_path / "other")
    broken = tmp_path / "corpus.jsonl.gz"
    broken.write_bytes(gzip.compress(corpus.read_bytes())[:-100])
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="gzip stream is truncated"):
        prepare(make_config([corpus, broken], tokenizer={"path": str(tmp_path / "other" / "tokenizer")}))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_hub_dataset_is_prepared_again_when_its_revision_changes(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    corpus.rename(tmp_path / "repository" / "train.jsonl")
    config = make_config([f"hf:{tmp_path / 'repository'}"])
    folders = set()
    for revision in ("1", "2"):
        monkeypatch.setattr(tables, "hub_revision", lambda name, revision=revision: revision)
        with PrepareJob(config, find_inputs(config.data.inputs), None) as job:
            folders.add(job.folder)
        manifest = prepare(config)
        assert manifest.inputs[0].revision == revision
        assert prepare(config) == manifest
    assert len(folders) == 2


def test_leftovers_of_dead_runs_are_cleared_and_strange_folders_kept(
    make_config: MakeConfig, corpus: Path, tmp_path: Path
) -> None:
    host = os.uname().nodename
    dead, alive = (tmp_path / f".dataset.partial.{host}.{number}" for number in (os.getpid(), 1))
    for folder in (dead, alive):
        folder.mkdir()
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    prepare(make_config([corpus]))
    os.close(lock)
    assert not dead.exists()
    assert alive.exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UserError, match="thesis exists and is not a prepared dataset"):
        prepare(make_config([corpus], data={"dir": str(tmp_path / "thesis")}))


def test_error_for_missing_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No prepared data at .*Run moh-prepare CONFIG first"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest"):
        load_manifest(tmp_path)
