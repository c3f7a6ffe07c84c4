"""Tests of what prepare leaves out of a corpus, counts, and refuses."""

import gzip
import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.corpora import write_jsonl

from moh_megatron.config.schema import Config, DataConfig
from moh_megatron.data.prepare import duplicates, inputs
from moh_megatron.data.prepare.indexed_writer import Index, open_tokens
from moh_megatron.data.prepare.inputs import find_inputs, most_documents, plan_parts
from moh_megatron.data.prepare.part import RECORD
from moh_megatron.data.prepare.pipeline import prepare
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.io.errors import UserError

MakeConfig = Callable[..., Config]


def stored(folder: Path, split: str) -> list[str]:
    """The texts of the documents of a split."""
    index, tokens = Index(folder / split), open_tokens(folder / split)
    tokenizer = load_tokenizer(folder / "tokenizer")
    return [tokenizer.decode(ids) for ids in np.split(tokens, np.cumsum(index.lengths)[:-1])]


def stored_in_both(folder: Path) -> list[str]:
    return stored(folder, "train") + stored(folder, "validation")


def test_deduplication_removes_exact_duplicates(make_config: MakeConfig, paragraphs: list[str], tmp_path: Path) -> None:
    texts = [*paragraphs, *paragraphs[::2], paragraphs[0] + " "]
    files = [write_jsonl(tmp_path / "a.jsonl", texts), write_jsonl(tmp_path / "b.jsonl", paragraphs[:3])]
    folder = tmp_path / "dataset"
    assert prepare(make_config(files)).counts.duplicates == 0
    assert len(stored_in_both(folder)) == len(texts) + 3
    manifest = prepare(make_config(files, data={"deduplicate": True}))
    assert manifest.counts.duplicates == len(paragraphs[::2]) + 3
    kept = set(paragraphs) | {paragraphs[0] + " "}
    assert sorted(stored_in_both(folder)) == sorted(kept)
    assert manifest.train.documents + manifest.validation.documents == len(kept)
    in_order = [text for text in dict.fromkeys(texts) if text in set(stored(folder, "train"))]
    assert stored(folder, "train") == in_order


def test_mark_duplicates_with_little_memory_marks_every_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MEMORY", 24 * 50)
    generator = np.random.default_rng(0)
    records = np.zeros(3000, RECORD)
    records["hash"] = generator.integers(0, 4, 3000)
    records["hash_low"] = generator.integers(0, 300, 3000)
    records["dropped"] = generator.random(3000) < 0.1
    seen: set[tuple[int, int]] = set()
    expected = []
    for record in records:
        key = (int(record["hash"]), int(record["hash_low"]))
        expected.append(not record["dropped"] and key in seen)
        if not record["dropped"]:
            seen.add(key)

    marks = duplicates.mark_duplicates(np.array_split(records, 11), len(records), tmp_path)
    assert (tmp_path / "duplicates").stat().st_blocks * 512 >= len(records), "sparse: a full disk would be a bus error"
    assert marks.astype(bool).tolist() == expected
    assert 0 < sum(expected) < 3000


def test_documents_are_dropped_by_length_and_normalised(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    texts = [*paragraphs, "short", "x" * 3000, "y " * 40_000, "Cafe\u0301 " * 20]
    data = {"drop_shorter": 10, "drop_longer": 2999, "normalization": "nfc", "max_document_bytes": 1000}
    manifest = prepare(make_config([write_jsonl(tmp_path / "a.jsonl", texts)], data=data))
    expected = [unicodedata.normalize("NFC", text) for text in texts if 10 <= len(text) <= 2999]
    assert sorted(stored_in_both(tmp_path / "dataset")) == sorted(expected)
    counts = manifest.counts
    assert (counts.too_short, counts.too_long) == (sum(len(text) < 10 for text in texts), 2)
    assert counts.records == len(texts)
    assert "left out: " in manifest.summary()


def test_long_document_encoded_in_chunks_is_stored_as_one(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    text = "\n".join(paragraphs)
    path = write_jsonl(tmp_path / "a.jsonl", [*paragraphs, text])
    manifest = prepare(make_config([path], data={"max_document_bytes": 1000}))
    assert sorted(stored_in_both(tmp_path / "dataset")) == sorted([*paragraphs, text])
    assert manifest.counts.in_pieces == 1 + sum(len(paragraph.encode()) > 1000 for paragraph in paragraphs)


def test_documents_keep_their_split_when_the_corpus_grows(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", paragraphs)
    prepare(make_config([path]))
    before = set(stored(tmp_path / "dataset", "validation"))
    write_jsonl(path, [f"{text} Again." for text in paragraphs] + paragraphs)
    prepare(make_config([path]))
    assert {text for text in stored(tmp_path / "dataset", "validation") if text in set(paragraphs)} == before


def test_rejects_are_refused_above_the_limit_and_listed_below(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", paragraphs)
    path.write_bytes(path.read_bytes() + b'\n{"text": 3}\n\xff\n')
    folder = tmp_path / "dataset"
    with pytest.raises(UserError) as refused:
        prepare(make_config([path]))
    lines = str(refused.value).splitlines()
    assert lines[0] == "2 of 42 records were rejected, more than data.max_reject_fraction (0.001):"
    assert lines[1] == f"{path}, line 42: field 'text' must be a string. Got int."
    assert lines[2].startswith(f"{path}, line 43: not UTF-8 (value 0xff at byte 1 of the line, ")
    assert not folder.exists()
    manifest = prepare(make_config([path], data={"max_reject_fraction": 0.1}))
    assert (manifest.counts.records, manifest.counts.rejects) == (42, 2)
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [(str(path), 42), (str(path), 43)]
    assert not (tmp_path / "dataset.parts").exists()


def test_prepare_stops_early_if_every_record_is_rejected(
    make_config: MakeConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make_config([corpus]))
    monkeypatch.setattr(inputs, "SMALLEST_PART", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 40_000)
    tokenizer = str(tmp_path / "dataset" / "tokenizer")
    with pytest.raises(
        UserError, match=r"(?s)no field 'text'; the record has 'body'. Set data.text_key.*all [\d,]+ are"
    ):
        prepare(make_config([path], tokenizer={"path": tokenizer}, data={"max_reject_fraction": 0.01}))
    listed = (tmp_path / "dataset.parts" / "rejects.jsonl").read_text().splitlines()
    assert 400 < len(listed) < 10_000
    assert json.loads(listed[-1])["line"] == len(listed)


def test_large_reject_before_many_short_records_does_not_stop_prepare(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "SMALLEST_PART", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 200_000, *paragraphs, *map(str, range(2000))])
    manifest = prepare(make_config([path], data={"max_record_bytes": 100_000}))
    assert (manifest.counts.rejects, manifest.counts.records) == (1, 2041)


def test_most_documents_is_an_upper_bound_for_the_shortest_records(tmp_path: Path) -> None:
    for name, content, data in (
        ("a.jsonl", b'{"text":""}\n' * 100, DataConfig()),
        ("a.json", '{"é":"","b":""}\n'.encode() * 100, DataConfig(template="{b}{é}{b}")),
        ("a.txt", b"x\n" * 100, DataConfig(text_unit="line")),
    ):
        (tmp_path / name).write_bytes(content.removesuffix(b"\n"))
        found = find_inputs([str(tmp_path / name)])
        (part,) = plan_parts(found, data.text_unit)
        assert 100 <= most_documents(found, part, data) <= 101
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    assert most_documents(find_inputs([str(tmp_path / "a.jsonl.gz")]), part, DataConfig()) == float("inf")


def test_existing_dataset_with_too_many_rejects_is_refused(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", paragraphs)
    path.write_bytes(path.read_bytes() + b"no record\n")
    prepare(make_config([path], data={"max_reject_fraction": 0.9}))
    with pytest.raises(UserError, match=r"1 of 41 records were rejected when it was made, .*rejects\.jsonl lists them"):
        prepare(make_config([path]))


def test_truncated_file_is_refused_and_leaves_no_files(
    make_config: MakeConfig, paragraphs: list[str], tmp_path: Path
) -> None:
    content = gzip.compress(write_jsonl(tmp_path / "a.jsonl", paragraphs).read_bytes())
    path = tmp_path / "b.jsonl.gz"
    path.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: the gzip stream is truncated. Copy or download the file again"):
        prepare(make_config([path]))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz"]


def test_manifest_records_the_inputs(make_config: MakeConfig, corpus: Path) -> None:
    (record,) = prepare(make_config([corpus])).inputs
    assert record.path == str(corpus)
    assert record.sha256 == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert record.bytes == corpus.stat().st_size
