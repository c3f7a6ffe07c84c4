"""Reads single held-out documents, over which losses are averaged with a standard error."""

from __future__ import annotations

import torch
from torch import Tensor

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.prepare.indexed_writer import Index, open_tokens
from moh_megatron.io.errors import UserError

MIN_TOKENS = 64
"""Shorter documents are left out."""


def held_out_documents(config: Config, max_documents: int | None = None) -> list[Tensor]:
    """The first S + 1 tokens of each validation document, int64, in file order; S is train.sequence_length.

    Documents of fewer than ``MIN_TOKENS`` tokens are left out; at most ``max_documents`` are read.

    Raises:
        UserError: there are fewer than two, or the data is a blend.
    """
    if config.data.sources:
        raise UserError("data.sources must be empty to measure single documents. Name one of them in data.dir.")
    prefix = data_dir(config) / "validation"
    index, tokens = Index(prefix), open_tokens(prefix)
    documents: list[Tensor] = []
    for first, end in zip(index.documents[:-1], index.documents[1:], strict=True):
        length = int(index.lengths[first:end].sum())
        if length < MIN_TOKENS or len(documents) == max_documents:
            continue
        start = int(index.pointers[first]) // index.dtype.itemsize
        beginning = tokens[start : start + min(length, config.train.sequence_length + 1)]
        documents.append(torch.from_numpy(beginning.astype("int64")))
    if len(documents) < 2:
        raise UserError(
            f"{prefix}: at least two documents of {MIN_TOKENS} tokens are needed for a standard error. "
            f"Got {len(documents)}. Raise data.validation_fraction, or give more text."
        )
    return documents
