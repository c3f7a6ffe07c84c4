"""Checksums and the message about differences between ranks; tests with real processes cover the gathering."""

from threading import Timer

import pytest
import torch

from moh_megatron.train.fault_tolerance.agreement import _differences, checksums, configuration, run_folder, software


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_changes_with_any_bit_or_order(dtype):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = checksums([("w", weight)])
    assert checksums([("w", weight.clone())]) == before
    swapped = weight.clone()
    swapped.view(-1)[[0, 1]] = swapped.view(-1)[[1, 0]]
    assert checksums([("w", swapped)]) != before
    changed = weight.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else 9
    assert checksums([("w", changed)]) != before


def test_checksum_of_no_parameters_is_empty():
    assert checksums([]) == {}
    assert set(checksums([("empty", torch.empty(0))])) == {"empty"}


def test_differences_name_the_ranks_of_each_value():
    parts = {0: {"a": "1", "b": "2"}, 1: {"a": "1", "b": "3"}, 2: {"a": "1"}}
    assert _differences(parts) == ["b: 2 on rank 0; 3 on rank 1; nothing on rank 2"]


def test_at_most_ten_differences_are_listed():
    parts = {rank: {f"w{number:02d}": str(rank) for number in range(25)} for rank in range(2)}
    assert len(_differences(parts)) == 11
    assert _differences(parts)[-1] == "and 15 more"


def test_software_claims_versions_of_packages_that_compute():
    packages = {"torch", "megatron-core", "deepspeed", "numpy", "safetensors", "tokenizers", "transformers"}
    assert software().parts.keys() == packages | {"python"}


def test_run_folder_that_a_rank_does_not_share_differs(tmp_path):
    marker = tmp_path / "marker"
    without_marker = run_folder(marker, timeout=0)
    marker.touch()
    with_marker = run_folder(marker, timeout=0)
    differences = _differences({0: with_marker.parts, 1: without_marker.parts})
    assert differences == [f"what rank 0 wrote to {tmp_path}: seen on rank 0; not seen on rank 1"]
    assert "run.dir must be on a disk that all nodes share" in with_marker.remedy


def test_run_folder_waits_for_a_marker_that_appears_late(tmp_path):
    marker = tmp_path / "marker"
    timer = Timer(0.3, marker.touch)
    timer.start()
    late = run_folder(marker, timeout=30)
    timer.join()
    assert late == run_folder(marker)


def test_configuration_claim_changes_with_any_key(tiny):
    assert configuration(tiny()).hash == configuration(tiny()).hash
    assert configuration(tiny()).hash != configuration(tiny({"run.seed": 5})).hash
    assert configuration(tiny()).hash != configuration(tiny({"train.timeout_seconds": 5.0})).hash
