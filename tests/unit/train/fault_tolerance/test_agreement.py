"""Checksums and how differences between ranks are told; the gathering itself is tested with real processes."""

from threading import Timer

import pytest
import torch

from moh_megatron.train.fault_tolerance.agreement import _differences, checksums, configuration, run_folder, software


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


def test_the_versions_that_count():
    packages = {"torch", "megatron-core", "deepspeed", "numpy", "safetensors", "tokenizers", "transformers"}
    assert software().parts.keys() == packages | {"python"}


def test_a_folder_that_a_rank_does_not_share(tmp_path):
    mark = tmp_path / "mark"
    elsewhere = run_folder(mark, patience=0)
    mark.touch()
    here = run_folder(mark, patience=0)
    held = {0: here.parts, 1: elsewhere.parts}
    assert _differences(held) == [f"what rank 0 wrote to {tmp_path}: seen on rank 0; not seen on rank 1"]
    assert "run.dir must be on a disk that all nodes share" in here.remedy


def test_a_mark_that_shows_late(tmp_path):
    mark = tmp_path / "mark"
    later = Timer(0.3, mark.touch)
    later.start()
    late = run_folder(mark, patience=30)
    later.join()
    assert late == run_folder(mark)


def test_every_key_of_the_configuration_counts(tiny):
    assert configuration(tiny()).hash == configuration(tiny()).hash
    assert configuration(tiny()).hash != configuration(tiny({"run.seed": 5})).hash
    assert configuration(tiny()).hash != configuration(tiny({"train.timeout_seconds": 5.0})).hash
