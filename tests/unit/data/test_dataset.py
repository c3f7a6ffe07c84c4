"""Tests of the sequences that training and validation read, and of their batches."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.corpora import write_jsonl
from torch import distributed

from moh_megatron.config.schema import Config
from moh_megatron.data import dataset as dataset_module
from moh_megatron.data.batches import train_batches, validation_batches
from moh_megatron.data.dataset import Sequences, build_train_dataset, build_validation_datasets
from moh_megatron.data.dataset_manifest import load_dataset_tokenizer
from moh_megatron.data.prepare.pipeline import prepare
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.io.errors import Fault, UserError

MakeConfig = Callable[..., Config]
Build = Callable[[Config], tuple[Sequences, Sequences]]


@pytest.fixture
def build() -> Build:
    def both(config: Config) -> tuple[Sequences, Sequences]:
        prepare(config)
        data = load_prepared(config)
        return (
            build_train_dataset(config, data, data.tokenizer()),
            build_validation_datasets(config, data, data.tokenizer())["data"],
        )

    return both


def samples(dataset: Sequences) -> list[list[int]]:
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_samples_are_consecutive_stored_tokens(make_config: MakeConfig, corpus: Path, build: Build) -> None:
    config = make_config([corpus], train={"total_tokens": 64 * 500})
    train, validation = build(config)
    assert len(train) == config.train.steps * 4 == 2000
    folder = Path(str(config.data.dir))
    for dataset, name in ((train, "train"), (validation, "validation")):
        stored = np.fromfile(folder / f"{name}.bin", dtype=np.uint16)
        documents = {document.tobytes() for document in np.split(stored, np.flatnonzero(stored == 1) + 1)}
        for tokens in [dataset[index] for index in range(0, len(dataset), 7)]:
            assert tokens.dtype == torch.int64
            assert tokens.shape == (17,)
            # Documents come in any order, but the tokens between two end-of-document tokens are from one of them.
            stored_tokens = tokens.numpy().astype(np.uint16)
            for part in np.split(stored_tokens, np.flatnonzero(stored_tokens == 1) + 1):
                assert any(part.tobytes() in document for document in documents)
    assert any(1 in sample for sample in samples(train))
    # Validation is one pass over the tokens; a sequence shares its last token with the next one.
    tokens = np.fromfile(folder / "validation.bin", dtype=np.uint16)
    assert len(validation) == (len(tokens) - 1) // 16


def test_documents_of_a_sample_hold_its_tokens(make_config: MakeConfig, corpus: Path, build: Build) -> None:
    config = make_config([corpus], train={"total_tokens": 64 * 50})
    train, _ = build(config)
    stored = np.fromfile(Path(str(config.data.dir)) / "train.bin", dtype=np.uint16)
    documents = np.split(stored, np.flatnonzero(stored == 1) + 1)
    several = 0
    for index in range(len(train)):
        parts, tokens = train.documents(index), train[index].numpy()
        several += len(parts) > 1
        expected = np.concatenate([documents[part.document][part.token :] for part in parts])
        assert (expected[: len(tokens)] == tokens).all()
    assert several > 0


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["removed", "truncated"])
def test_file_that_changes_during_a_run_is_a_fault(
    make_config: MakeConfig, corpus: Path, build: Build, suffix: str, change: str
) -> None:
    config = make_config([corpus])
    train, _ = build(config)
    file = Path(str(config.data.dir)).resolve() / f"train{suffix}"
    assert train.name == str(file.with_suffix(""))
    train[0]
    if change == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(Fault, match=f"train{suffix}: the data"):
        train[0]


def test_order_depends_on_the_seed_alone(make_config: MakeConfig, corpus: Path, build: Build) -> None:
    config = make_config([corpus])
    train, validation = (samples(dataset) for dataset in build(config))
    cache = Path(str(config.data.dir)) / "cache"
    assert [samples(dataset) for dataset in build(config)] == [train, validation]
    shutil.rmtree(cache)
    assert [samples(dataset) for dataset in build(config)] == [train, validation]
    assert samples(build(make_config([corpus], seed=2))[0]) != train
    first_five = samples(build(make_config([corpus], train={"eval_samples": 5}))[1])
    assert first_five == validation[:5]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("small_index", [None, 0], ids=["small", "large"])
def test_descriptors_stay_flat_and_caches_few_over_500_epochs_of_two_documents(
    make_config: MakeConfig, tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch, small_index: int | None
) -> None:
    if small_index is not None:  # As for a dataset whose indices do not fit in memory.
        monkeypatch.setattr(dataset_module, "_SMALL_INDEX", small_index)
    corpus = write_jsonl(tmp_path / "two.jsonl", ["the quick brown fox jumps over a lazy dog " * 2, "seven wizards"])
    data = {"validation_fraction": 0.0}
    config = make_config([corpus], data=data, vocab_size=320, train={"sequence_length": 16, "total_tokens": 64 * 260})
    prepare(config)
    prepared = load_prepared(config)
    train = build_train_dataset(config, prepared, prepared.tokenizer())
    epoch = (prepared.sources[0].manifest.train.tokens - 1) // 16
    assert len(train) >= 500 * epoch
    assert len(train[0]) == len(train[epoch]) == 17  # Two epochs are open.
    before = open_descriptors()
    samples_of_500 = [train[index].tolist() for index in range(500 * epoch)]
    assert open_descriptors() <= before
    orders = {str(samples_of_500[start : start + epoch]) for start in range(0, len(samples_of_500), epoch)}
    assert len(orders) > 1, "each epoch has its own order"
    caches = list((tmp_path / "dataset" / "cache").glob("*/epoch-*"))
    assert len(caches) == (0 if small_index is None else -(-len(train) // epoch))
    # The two kinds of index give the same order, however often one goes back.
    monkeypatch.setattr(dataset_module, "_SMALL_INDEX", 64 * 1024**2)
    other = build_train_dataset(config, prepared, prepared.tokenizer())
    for index in (0, 499 * epoch, 7 * epoch - 1, 7 * epoch, 123, 321, 122):
        assert train[index].tolist() == other[index].tolist() == samples_of_500[index]
        assert other.documents(index) == train.documents(index)


def test_many_small_epochs_are_the_same_on_ranks_that_build_no_cache(
    make_config: MakeConfig, corpus: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "_CACHED_EPOCHS", 0)
    expected = samples(build(make_config([corpus]))[0])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(distributed, "get_rank", lambda *group: 1)
    try:
        data = load_prepared(make_config([corpus]))
        assert samples(build_train_dataset(make_config([corpus]), data, data.tokenizer())) == expected
    finally:
        monkeypatch.undo()
        distributed.destroy_process_group()


def test_incomplete_index_cache_is_built_again(make_config: MakeConfig, corpus: Path, build: Build) -> None:
    config = make_config([corpus])
    expected = samples(build(config)[0])
    (cache,) = (Path(str(config.data.dir)) / "cache").glob("train-*/epoch-0")
    (cache / "complete").unlink()
    (index,) = cache.glob("*shuffle_index.npy")
    index.write_bytes(index.read_bytes()[:-8])
    assert samples(build(config)[0]) == expected


def test_samples_are_the_same_under_torch_distributed(
    make_config: MakeConfig, corpus: Path, build: Build, tmp_path: Path
) -> None:
    expected = [samples(dataset) for dataset in build(make_config([corpus]))]
    shutil.rmtree(tmp_path / "dataset" / "cache")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert [samples(dataset) for dataset in build(make_config([corpus]))] == expected
    finally:
        distributed.destroy_process_group()


def test_dataset_that_does_not_fit_the_model_is_refused(make_config: MakeConfig, corpus: Path) -> None:
    config = make_config([corpus])
    manifest = prepare(config)
    tokenizer = load_dataset_tokenizer(Path(str(config.data.dir)), manifest)
    with pytest.raises(UserError, match=r"model\.vocab_size must be at least 400, .* Got 100"):
        build_train_dataset(make_config([corpus], vocab_size=100), load_prepared(config), tokenizer)
    with pytest.raises(UserError, match="fewer than one sequence: at least 100001"):
        build_validation_datasets(
            make_config([corpus], train={"sequence_length": 100000}), load_prepared(config), tokenizer
        )
    tokenizer_file = Path(str(config.data.dir)) / "tokenizer" / "tokenizer.json"
    tokenizer_file.write_text(tokenizer_file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(UserError, match="not the tokenizer this dataset was made with"):
        load_dataset_tokenizer(Path(str(config.data.dir)), manifest)


def test_dataset_without_validation_documents_is_read(make_config: MakeConfig, corpus: Path) -> None:
    config = make_config([corpus], data={"validation_fraction": 0.0})
    assert prepare(config).validation.documents == 0
    data = load_prepared(config)
    assert build_validation_datasets(config, data, data.tokenizer()) == {}
    assert len(build_train_dataset(config, data, data.tokenizer())) == 40


def sample_of_index(index: int) -> torch.Tensor:
    return torch.tensor([index, index])


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_samples_of_a_step_do_not_depend_on_the_data_parallel_size(
    data_parallel_size: int, micro_batch_size: int
) -> None:
    def batches(rank: int, start: int) -> list[list[torch.Tensor]]:
        return list(
            train_batches(
                Sequences(sample_of_index, 40),
                global_batch_size=8,
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=data_parallel_size,
                start_step=start,
                end_step=5,
            )
        )

    for start in (0, 3):
        ranks = [batches(rank, start) for rank in range(data_parallel_size)]
        for step in range(start, 5):
            micro_batches = [rank[step - start] for rank in ranks]
            assert {len(batches_of_rank) for batches_of_rank in micro_batches} == {
                8 // (micro_batch_size * data_parallel_size)
            }
            order = [
                row[0].item() for at_once in zip(*micro_batches, strict=True) for batch in at_once for row in batch
            ]
            assert order == list(range(step * 8, step * 8 + 8))


@pytest.mark.parametrize("length", [1, 7, 8, 9])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
def test_validation_counts_each_sample_once(length: int, data_parallel_size: int) -> None:
    ranks = [
        list(
            validation_batches(
                Sequences(sample_of_index, length),
                micro_batch_size=2,
                data_parallel_rank=rank,
                data_parallel_size=data_parallel_size,
            )
        )
        for rank in range(data_parallel_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-length // (2 * data_parallel_size))}
    assert {batch.tokens.shape for batches in ranks for batch in batches} == {(2, 2)}
    counted = [row[0].item() for batches in ranks for batch in batches for row in batch.tokens[: batch.samples]]
    assert sorted(counted) == list(range(length))
