"""Computes how well n-gram counts predict the validation tokens: the baselines a language model has to beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from moh_megatron.data.prepare.indexed_writer import open_tokens

CHUNK = 1 << 22
"""Tokens processed at once."""
TABLE = 1 << 26
"""The most bigram counts held at once (256 MiB); larger vocabularies take several passes."""


def baselines(train_prefix: str, validation_prefix: str, vocab_size: int) -> dict[str, float]:
    """Cross-entropies of the validation tokens under the counts of the training tokens, in nats a token.

    The prefixes are paths of Megatron datasets without .bin. A split is read as one stream of its documents in order,
    with the end-of-document tokens between them.

    ``unigram_entropy``: add-one smoothing, P(w) = (c(w) + 1) / (N + V).
    ``bigram_entropy``: Witten-Bell interpolation with that unigram, P(w | h) = (c(h, w) + T(h) P(w)) / (c(h) + T(h)),
    where T(h) is the number of distinct followers of h (Witten and Bell 1991). It is P(w) after a token without
    followers, and for the first token.
    """
    train, validation = open_tokens(train_prefix), open_tokens(validation_prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in _chunks(train, overlap=0):
        counts += np.bincount(chunk, minlength=vocab_size)
    unigram = (counts + 1) / (len(train) + vocab_size)
    unigram_nats = -sum(float(np.log(unigram[chunk]).sum()) for chunk in _chunks(validation, overlap=0))

    bigram_nats = -float(np.log(unigram[int(validation[0])]))
    rows = max(1, min(vocab_size, TABLE // vocab_size))
    for first in range(0, vocab_size, rows):
        bigram_nats += _bigram_nats(train, validation, unigram, first, min(first + rows, vocab_size))
    return {
        "unigram_entropy": unigram_nats / len(validation),
        "bigram_entropy": bigram_nats / len(validation),
    }


def _bigram_nats(
    train: NDArray[np.integer], validation: NDArray[np.integer], unigram: NDArray[np.float64], first: int, end: int
) -> float:
    """The sum of -log P over the validation tokens whose predecessor lies in [first, end)."""
    pairs = np.zeros((end - first, len(unigram)), dtype=np.uint32)
    for chunk in _chunks(train, overlap=1):
        before, after = _pairs(chunk, first, end)
        cells, counts = np.unique(before * len(unigram) + after, return_counts=True)
        pairs.reshape(-1)[cells] += counts.astype(np.uint32)
    followers = np.count_nonzero(pairs, axis=1)
    totals = pairs.sum(axis=1, dtype=np.int64)
    nats = 0.0
    for chunk in _chunks(validation, overlap=1):
        before, after = _pairs(chunk, first, end)
        distinct, total = followers[before], totals[before]
        smoothed = (pairs[before, after] + distinct * unigram[after]) / np.maximum(total + distinct, 1)
        nats -= float(np.log(np.where(total > 0, smoothed, unigram[after])).sum())
    return nats


def _pairs(chunk: NDArray[np.int64], first: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(row of the predecessor, token) of each pair whose predecessor lies in [first, end)."""
    before, after = chunk[:-1], chunk[1:]
    chosen = (before >= first) & (before < end)
    return before[chosen] - first, after[chosen]


def _chunks(tokens: NDArray[np.integer], overlap: int) -> Iterator[NDArray[np.int64]]:
    """Chunks of CHUNK tokens, each followed by the first ``overlap`` tokens of the next one."""
    for start in range(0, len(tokens), CHUNK):
        yield tokens[start : start + CHUNK + overlap].astype(np.int64)
