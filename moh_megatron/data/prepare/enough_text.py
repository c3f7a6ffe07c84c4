"""Finds out before anything is encoded whether the splits will hold a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moh_megatron.config.schema import Config, DataConfig
from moh_megatron.data.dataset_manifest import SPLITS, check_sizes
from moh_megatron.data.prepare.chunks import Chunk
from moh_megatron.data.prepare.encode import dropped
from moh_megatron.data.prepare.inputs import Input, Part
from moh_megatron.data.prepare.merge import held_out
from moh_megatron.data.prepare.read_documents import Reject, SegmentEnd, read_segment
from moh_megatron.data.tokenizer.tokenizer import Tokenizer

_MOST_TOKENS_OF_A_BYTE = 11
"""NFKC, which a tokenizer may apply, makes 33 bytes of the three of U+FDFA; no text grows more, and a byte that stands
alone is one token."""


_LONG = 64
"""Bytes of text a token from which on a document is taken to have enough tokens without counting them."""


class _Document(NamedTuple):
    """A document that is kept."""

    digest: bytes
    chunks: list[Chunk]
    """Its text; of a long document the beginning."""
    is_long: bool


def check_enough_text(
    config: Config, inputs: Sequence[Input], parts: Iterable[Part], tokenizer: Tokenizer | None
) -> None:
    """Raise UserError if a split cannot have the tokens of a sequence, as ``Manifest.check_fits`` would at the end.

    It reads documents until both splits have enough, which takes a moment unless they have too few. Without a
    ``tokenizer``, an upper bound of the tokens is counted. Text with rejects is left to the check of rejects. Inputs on
    the Hub are not read.
    """
    if any(source.kind == "hub" for source in inputs):
        return
    data, least = config.data, config.train.sequence_length + 1
    needed = SPLITS if data.validation_fraction else ("train",)
    documents: dict[str, int] = dict.fromkeys(SPLITS, 0)
    tokens = documents.copy()
    for document in _documents(inputs, parts, data, _LONG * least):
        if document is None:
            return
        number = np.array([int.from_bytes(document.digest[:8], "big")], dtype=np.uint64)
        split = SPLITS[int(held_out(number, data.validation_fraction)[0])]
        documents[split] += 1
        if tokens[split] < least:
            tokens[split] += least if document.is_long else _tokens(document.chunks, tokenizer)
        if all(tokens[name] >= least for name in needed):
            return
    if sum(documents.values()):
        check_sizes(documents, tokens, data.validation_fraction, config.train.sequence_length, tokenizer is None)


def _tokens(chunks: Sequence[Chunk], tokenizer: Tokenizer | None) -> int:
    """The tokens of a document and of its end; without a ``tokenizer`` a number that they do not exceed."""
    texts = [chunk.text for chunk in chunks]
    if not any(texts):
        return 0
    if tokenizer is None:
        # A tokenizer may put a token of its own, such as a space, before the text.
        return sum(_MOST_TOKENS_OF_A_BYTE * len(chunk.utf8) + 1 for chunk in chunks) + 1
    continued = [index > 0 for index in range(len(texts))]
    return sum(map(len, tokenizer.encode_batch(texts, continued))) + 1


def _documents(
    inputs: Sequence[Input], parts: Iterable[Part], data: DataConfig, long: int
) -> Iterator[_Document | None]:
    """Each document that is kept, with at most about ``long`` bytes of its text, and None for a reject."""
    for part in parts:
        for segment in part:
            digest, characters, size, held = hashlib.sha256(), 0, 0, []
            for event in read_segment(inputs[segment.input], segment, data, lambda count: None):
                if isinstance(event, SegmentEnd):
                    continue
                if isinstance(event, Reject):
                    yield None
                    continue
                digest.update(event.utf8)
                characters += len(event.text)
                if size < long:
                    held.append(event)
                size += len(event.utf8)
                if event.last:
                    if not dropped(characters, data, last=True):
                        yield _Document(digest.digest(), held, size >= long)
                    digest, characters, size, held = hashlib.sha256(), 0, 0, []
