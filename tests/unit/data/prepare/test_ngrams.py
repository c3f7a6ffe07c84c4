"""Tests of the n-gram baselines against their definitions."""

import math
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from moh_megatron.data.prepare import ngrams


def write_dataset(prefix: Path, documents: list[list[int]]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def slow_baselines(train: list[int], validation: list[int], size: int) -> dict[str, float]:
    """The definitions, computed one token at a time."""

    def unigram(token: int) -> float:
        return (train.count(token) + 1) / (len(train) + size)

    def bigram(before: int, token: int) -> float:
        following = [after for first, after in pairwise(train) if first == before]
        if not following:
            return unigram(token)
        distinct = len(set(following))
        return (following.count(token) + distinct * unigram(token)) / (len(following) + distinct)

    pairs = pairwise(validation)
    nats = -math.log(unigram(validation[0])) - sum(math.log(bigram(before, token)) for before, token in pairs)
    return {
        "unigram_entropy": -sum(math.log(unigram(token)) for token in validation) / len(validation),
        "bigram_entropy": nats / len(validation),
    }


@pytest.mark.parametrize(("chunk", "table"), [(1 << 22, 1 << 26), (7, 12), (1, 1)])
def test_baselines_equal_their_definitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, table: int
) -> None:
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    monkeypatch.setattr(ngrams, "TABLE", table)
    generator = np.random.default_rng(0)
    train = [[*generator.integers(1, 6, size=length).tolist(), 0] for length in (9, 1, 30)]
    validation = [[*generator.integers(1, 8, size=length).tolist(), 0] for length in (8, 13)]
    result = ngrams.baselines(
        write_dataset(tmp_path / "train", train), write_dataset(tmp_path / "validation", validation), 9
    )
    expected = slow_baselines(list(chain(*train)), list(chain(*validation)), 9)
    assert result == pytest.approx(expected, rel=1e-12)
