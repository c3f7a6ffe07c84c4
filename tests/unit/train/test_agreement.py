"""Checksums and how differences between ranks are told; the gathering itself is tested with real processes."""

import pytest
import torch

from moh_megatron.train.agreement import _differences, checksums, configuration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_every_bit_and_place(dtype):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = checksums([("w", weight)])
    assert checksums([("w", weight.clone())]) == before
    swapped = weight.clone()
    swapped.view(-1)[[0, 1]] = swapped.view(-1)[[1, 0]]
    assert checksums([("w", swapped)]) != before
    changed = weight.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else 9
    assert checksums([("w", changed)]) != before


def test_a_checksum_of_nothing():
    assert checksums([]) == {}
    assert set(checksums([("empty", torch.empty(0))])) == {"empty"}


def test_differences_name_the_ranks_of_each_value():
    held = {0: {"a": "1", "b": "2"}, 1: {"a": "1", "b": "3"}, 2: {"a": "1"}}
    assert _differences(held) == ["b: 2 on rank 0; 3 on rank 1; nothing on rank 2"]


def test_many_differences_are_cut():
    held = {rank: {f"w{number:02d}": str(rank) for number in range(25)} for rank in range(2)}
    assert len(_differences(held)) == 11
    assert _differences(held)[-1] == "and 15 more"


def test_every_key_of_the_configuration_counts(tiny):
    assert configuration(tiny()).hash == configuration(tiny()).hash
    assert configuration(tiny()).hash != configuration(tiny({"run.seed": 5})).hash
    assert configuration(tiny()).hash != configuration(tiny({"train.timeout_seconds": 5.0})).hash
