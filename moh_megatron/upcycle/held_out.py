"""Held-out documents, each by itself: what a loss with a standard error is measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.prepare.indexed_writer import Index, open_tokens
from moh_megatron.io.errors import UserError

SHORTEST = 64
"""Tokens of a document that is worth measuring."""


def held_out(config: Config, most: int | None = None) -> list[Tensor]:
    """The beginnings of the validation documents, int64 [at most S + 1], in their order: S is train.sequence_length.

    Documents of fewer than ``SHORTEST`` tokens are passed over; ``most`` limits their number.

    Raises:
        UserError: there are fewer than two, or the data is a blend.
    """
    if config.data.sources:
        raise UserError("data.sources must be empty to measure single documents. Name one of them in data.dir.")
    prefix = data_dir(config) / "validation"
    index, tokens = Index(prefix), open_tokens(prefix)
    found: list[Tensor] = []
    for first, end in zip(index.documents[:-1], index.documents[1:], strict=True):
        length = int(index.lengths[first:end].sum())
        if length < SHORTEST or len(found) == most:
            continue
        start = int(index.pointers[first]) // index.dtype.itemsize
        part = tokens[start : start + min(length, config.train.sequence_length + 1)]
        found.append(torch.from_numpy(part.astype("int64")))
    if len(found) < 2:
        raise UserError(
            f"{prefix}: at least two documents of {SHORTEST} tokens are needed for a standard error. Got {len(found)}. "
            "Raise data.validation_fraction, or give more text."
        )
    return found
