"""Which documents are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.held_out import SHORTEST, held_out


@pytest.fixture
def config(tiny, tmp_path):
    """Of documents of 1 to 4 times ``SHORTEST`` tokens: odd ones to learn from, even ones held out, and short ones."""
    for split, odd in (("train", 1), ("validation", 0)):
        builder = IndexedDatasetBuilder(get_bin_path(str(tmp_path / split)), dtype=np.uint16)
        for times in (1, 2, 3, 4):
            for length in (SHORTEST * times, SHORTEST - 1):
                builder.add_document(torch.arange(length) * 2 + odd, [length])
        builder.finalize(get_idx_path(str(tmp_path / split)))
    return tiny({"data.dir": str(tmp_path), "train.sequence_length": 2 * SHORTEST})


def test_the_beginnings_of_held_out_documents(config):
    found = held_out(config)
    assert [len(each) for each in found] == [SHORTEST, 2 * SHORTEST, 2 * SHORTEST + 1, 2 * SHORTEST + 1]
    for each in found:
        assert torch.equal(each, torch.arange(len(each)) * 2)
    assert [len(each) for each in held_out(config, 2)] == [SHORTEST, 2 * SHORTEST]


def test_one_has_no_standard_error(config):
    with pytest.raises(UserError, match=r"at least two documents of 64 tokens are needed .* Got 1"):
        held_out(config, 1)
