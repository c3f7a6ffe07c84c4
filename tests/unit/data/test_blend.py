"""Tests of mixing sources: shares, epochs, and weights that change."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config, SourceConfig, WeightChange
from moh_megatron.config.source_weights import shares_until
from moh_megatron.config.validate import violations
from moh_megatron.data.blend import draw
from moh_megatron.data.dataset import build_train_dataset, build_validation_datasets
from moh_megatron.data.dataset_manifest import SPLITS
from moh_megatron.data.prepare.inputs import find_inputs
from moh_megatron.data.prepare.pipeline import prepare, prepare_tokenizer
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.data.source_configs import source_configs
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.train.fault_tolerance import agreement

MakeConfig = Callable[..., Config]
MIXTURE = Path(__file__).parents[3] / "configs" / "data" / "paper_mixture.yaml"


def with_sources(
    config: Config, weights: dict[str, float], changes: dict[int, dict[str, float]] | None = None
) -> Config:
    old = {source.name: source for source in config.data.sources}
    sources = tuple(
        replace(old[name], weight=weight) if name in old else SourceConfig(name=name, weight=weight)
        for name, weight in weights.items()
    )
    steps = tuple(WeightChange(step=step, weights=new) for step, new in (changes or {}).items())
    return replace(config, data=replace(config.data, inputs=(), sources=sources, weight_changes=steps))


def test_paper_mixture_finds_the_files_that_its_commands_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloaded = {
        "books": "corpus/books/data/train-00000-of-00023.parquet",
        "wikipedia": "corpus/wikipedia/wiki.jsonl",
        "arxiv": "corpus/arxiv/arxiv_023827cd-7ee8-42e6-aa7b-661731f4c70f.jsonl",
        "stackexchange": "corpus/stackexchange/stackexchange.jsonl",
        "c4": "corpus/c4/en/c4-train.00000-of-01024.json.gz",
        "dolma": "corpus/dolma/dolma-v1_7/books/books-0000.json.gz",
        "pile": "corpus/pile/train/00.jsonl.zst",
    }
    monkeypatch.chdir(tmp_path)
    for name in downloaded.values():
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()
    for source in load_config(MIXTURE).data.sources:
        assert [found.name for found in find_inputs(source.inputs)] == [downloaded[source.name]]


def test_paper_mixture_is_drawn_by_its_weights(make_config: MakeConfig) -> None:
    mixture = load_config(MIXTURE)
    assert [round(source.weight, 2) for source in mixture.data.sources] == [4.24, 3.5, 4.37, 3.19, 10.94, 61.28, 12.48]
    config = make_config([], train={"total_tokens": 16 * 10_000})
    config = replace(config, data=replace(config.data, sources=mixture.data.sources))
    draws = draw(config)
    assert len(draws.sources) == 10_000
    total = sum(source.weight for source in mixture.data.sources)
    for number, source in enumerate(mixture.data.sources):
        drawn = int((draws.sources == number).sum())
        assert drawn == draws.counts[number]
        assert abs(drawn / 10_000 - source.weight / total) < 0.005 * source.weight / total + 1e-4
        assert draws.indices[draws.sources == number].tolist() == list(range(drawn))


def test_weights_change_from_their_step_on_and_no_sample_is_drawn_twice(make_config: MakeConfig) -> None:
    base = make_config([], train={"total_tokens": 64 * 3000})
    before = with_sources(base, {"a": 0, "b": 3, "c": 1})
    after = with_sources(base, {"a": 0, "b": 3, "c": 1}, {1000: {"b": 0, "a": 1}, 5000: {"c": 9}})
    first, second = draw(before), draw(after)
    cut = 1000 * 4
    assert first.counts == [0, 9000, 3000]
    assert np.array_equal(first.sources[:cut], second.sources[:cut])
    assert np.array_equal(first.indices[:cut], second.indices[:cut])
    assert np.bincount(second.sources[cut:], minlength=3).tolist() == [4000, 0, 4000]
    for number in range(3):
        assert second.indices[second.sources == number].tolist() == list(range(second.counts[number]))
    assert shares_until(before, 1000) == shares_until(after, 1000) != shares_until(after, 1001)
    assert shares_until(before, 3000) == shares_until(with_sources(base, {"a": 0, "b": 6, "c": 2}, {7: {"b": 6}}), 3000)


@pytest.fixture
def blended(make_config: MakeConfig, chapters: list[str], tmp_path: Path) -> Config:
    """Two prepared sources, the second of which is short."""
    inputs = {}
    for name, texts in {"long": chapters[:8], "short": chapters[8:9]}.items():
        path = tmp_path / f"{name}.jsonl"
        lines = [line for text in texts for line in text.split("\n")]
        path.write_text("".join(json.dumps({"text": f"{line} {name}"}) + "\n" for line in lines))
        inputs[name] = (str(path),)
    config = make_config([], tokenizer={"path": str(tmp_path / "tokenizer")}, train={"total_tokens": 64 * 300})
    sources = tuple(SourceConfig(name=name, weight=1, inputs=paths) for name, paths in inputs.items())
    config = replace(config, data=replace(config.data, sources=sources))
    prepare_tokenizer(config, tmp_path / "tokenizer")
    for _, source in source_configs(config):
        prepare(source)
    return config


def test_blended_samples_come_from_their_sources(blended: Config, tmp_path: Path) -> None:
    data = load_prepared(blended)
    tokenizer = data.tokenizer()
    train = build_train_dataset(blended, data, tokenizer)
    assert len(train) == 1200
    stored = {name: np.fromfile(tmp_path / "dataset" / name / "train.bin", np.uint16) for name in ("long", "short")}
    documents = {
        name: {
            document.tobytes() for document in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)
        }
        for name, tokens in stored.items()
    }
    sources = draw(blended).sources
    seen: dict[str, list[bytes]] = {"long": [], "short": []}
    for index in range(len(train)):
        name = ("long", "short")[sources[index]]
        tokens = train[index].numpy().astype(np.uint16)
        seen[name].append(tokens.tobytes())
        if index < 60:
            for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1):
                assert any(part.tobytes() in document for document in documents[name])
    epoch = (len(stored["short"]) - 1) // 16
    assert len(seen["short"]) == 600 > 2 * epoch
    assert len(set(seen["short"][:epoch])) == epoch
    # With other weights from step 100 on, earlier samples are the same, and each source continues where it was.
    changed = with_sources(blended, {"long": 1, "short": 1}, {100: {"long": 3}})
    again = build_train_dataset(changed, data, tokenizer)
    assert all(train[index].equal(again[index]) for index in range(400))
    after = [again[index].numpy().astype(np.uint16).tobytes() for index in range(400, 1200)]
    drawn = draw(changed).sources[400:]
    assert [tokens for tokens, source in zip(after, drawn, strict=True) if source == 1] == seen["short"][200:400]
    validation = build_validation_datasets(blended, data, tokenizer)
    assert list(validation) == ["long", "short"]
    for name, sequences in validation.items():
        text = tokenizer.decode([token for index in range(len(sequences)) for token in sequences[index].tolist()])
        assert f" {name}" in text


def test_documents_of_a_blended_sample_are_known_in_every_epoch(blended: Config, tmp_path: Path) -> None:
    data = load_prepared(blended)
    eos_token_id = data.tokenizer().eos_token_id
    train = build_train_dataset(blended, data, data.tokenizer())
    documents = {}
    for name in ("long", "short"):
        stored = np.fromfile(tmp_path / "dataset" / name / "train.bin", np.uint16)
        documents[name] = np.split(stored, np.flatnonzero(stored == eos_token_id) + 1)
    sources = draw(blended).sources
    for index in range(len(train)):
        parts = train.documents(index)
        assert {part.source for part in parts} == {("long", "short")[sources[index]]}
        tokens = np.concatenate([documents[part.source][part.document][part.token :] for part in parts])
        assert (tokens[:17] == train[index].numpy()).all()
    assert train.name == ", ".join(str((tmp_path / "dataset" / name / "train").resolve()) for name in documents)


def test_missing_file_of_a_blended_source_is_a_fault(blended: Config, tmp_path: Path) -> None:
    data = load_prepared(blended)
    train = build_train_dataset(blended, data, data.tokenizer())
    sources = draw(blended).sources.tolist()
    (tmp_path / "dataset" / "short" / "train.bin").unlink()
    assert len(train[sources.index(0)]) == 17
    with pytest.raises(Fault, match=r"short/train\.bin: the data can no longer be read: No such file"):
        train[sources.index(1)]


def test_rank_agreement_covers_the_data_of_every_source(blended: Config) -> None:
    data = load_prepared(blended)
    files = [f"{name}/{split}{suffix}" for name in ("long", "short") for split in SPLITS for suffix in (".bin", ".idx")]
    claim = agreement.dataset(data)
    assert sorted(claim.parts) == sorted(files)
    short = data.sources[1].manifest
    other = replace(short, train=replace(short.train, files=short.validation.files))
    changed = replace(data, sources=(data.sources[0], replace(data.sources[1], manifest=other)))
    assert agreement.dataset(changed).hash != claim.hash


def test_budget_shows_tokens_and_warns_of_many_epochs(blended: Config) -> None:
    data = load_prepared(blended)
    text = data.budget(with_sources(blended, {"long": 7, "short": 1}))
    tokens = data.sources[0].manifest.train.tokens
    assert f"{7 / 8 * 19_200 / tokens:8.2f}" in text
    assert "87.50 %" in text
    assert "warning" not in text
    longer = replace(blended, train=replace(blended.train, total_tokens=64 * 3000))
    warned = data.budget(longer)
    assert "warning: short is read" in warned
    assert "give it more text, less weight, or lower train.total_tokens" in warned


def test_sources_with_different_tokenizers_are_refused(blended: Config, corpus: Path, tmp_path: Path) -> None:
    other = replace(blended.tokenizer, path=None)
    ((_, short),) = source_configs(blended, "short")
    prepare(replace(short, tokenizer=other))
    with pytest.raises(UserError, match=r"same tokenizer\. .*long was with \w{12}, .*short with \w{12}"):
        load_prepared(blended)
    with pytest.raises(UserError, match=r"--source: expected one of data\.sources \(long, short\)\. Got none"):
        list(source_configs(blended, "none"))


@pytest.mark.parametrize(
    ("weights", "changes", "expected"),
    [
        ({"a": 0.0}, {}, "data.sources must have a weight above 0"),
        ({"a": 1.0}, {5: {"b": 1.0}}, "data.weight_changes must name sources of data.sources (a). Got b"),
        ({"a": 1.0}, {5: {"a": 0.0}}, "must leave a weight above 0 at every step. Got none from step 5"),
        ({"a": 1.0}, {5: {"a": 2.0}, 3: {"a": 1.0}}, "must be in the order of their steps. Got [5, 3]"),
    ],
)
def test_impossible_source_weights_are_refused(
    make_config: MakeConfig, weights: dict[str, float], changes: dict[int, dict[str, float]], expected: str
) -> None:
    config = with_sources(make_config([], tokenizer={"path": "x"}), weights, changes)
    (found,) = violations(config)
    assert expected in found.message


def test_sources_with_inputs_or_without_tokenizer_are_refused(make_config: MakeConfig) -> None:
    config = with_sources(make_config([]), {"a": 1})
    found = violations(replace(config, data=replace(config.data, inputs=("x.jsonl",), sources=config.data.sources * 2)))
    assert [violation.key for violation in found] == ["data.inputs", "tokenizer.path", "data.sources"]
