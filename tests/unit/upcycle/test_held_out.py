"""Which held-out documents are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.held_out import MIN_TOKENS, held_out_documents


@pytest.fixture
def config(tiny, tmp_path):
    """Odd tokens to train on and even ones held out, in documents of 1 to 4 times ``MIN_TOKENS`` and shorter ones."""
    for split, odd in (("train", 1), ("validation", 0)):
        builder = IndexedDatasetBuilder(get_bin_path(str(tmp_path / split)), dtype=np.uint16)
        for times in (1, 2, 3, 4):
            for length in (MIN_TOKENS * times, MIN_TOKENS - 1):
                builder.add_document(torch.arange(length) * 2 + odd, [length])
        builder.finalize(get_idx_path(str(tmp_path / split)))
    return tiny({"data.dir": str(tmp_path), "train.sequence_length": 2 * MIN_TOKENS})


def test_beginnings_of_long_enough_validation_documents_are_read(config):
    documents = held_out_documents(config)
    assert [len(document) for document in documents] == [
        MIN_TOKENS,
        2 * MIN_TOKENS,
        2 * MIN_TOKENS + 1,
        2 * MIN_TOKENS + 1,
    ]
    for document in documents:
        assert torch.equal(document, torch.arange(len(document)) * 2)
    assert [len(document) for document in held_out_documents(config, 2)] == [MIN_TOKENS, 2 * MIN_TOKENS]


def test_a_single_document_is_refused(config):
    with pytest.raises(UserError, match=r"at least two documents of 64 tokens are needed .* Got 1"):
        held_out_documents(config, 1)
