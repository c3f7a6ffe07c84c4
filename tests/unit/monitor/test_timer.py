"""Seconds by part."""

import time

import pytest
import torch

from moh_megatron.monitor.device import known_peak, memory_bytes, peak_tflops
from moh_megatron.monitor.profile import profiled
from moh_megatron.monitor.records import read_records
from moh_megatron.monitor.restarts import code_version, record_start
from moh_megatron.monitor.timer import StepTimer


def test_parts_add_up_until_they_are_asked_for():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.part("forward"):
            time.sleep(0.02)
    assert list(timer.each("data", iter([1, 2]))) == [1, 2]
    seconds = timer.drain()
    assert 0.04 <= seconds["forward"] < 0.4
    assert 0 <= seconds["data"] < 0.02
    assert timer.drain() == {}


@pytest.mark.gpu
def test_on_a_gpu_the_device_s_time_counts():
    device = torch.device("cuda")
    timer = StepTimer(device)
    x = torch.randn(4096, 4096, device=device)
    with timer.part("forward"):
        for _ in range(20):
            x = x @ x / 4096
    torch.cuda.synchronize()
    assert timer.drain()["forward"] > 1e-3


def test_gpus_that_are_known():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989.0
    assert known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA A100-SXM4-40GB") == 312.0
    assert known_peak("NVIDIA GH200 480GB") == 989.0
    assert known_peak("something else") is None
    for longer in ("NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA A10G", "NVIDIA A1000"):
        assert known_peak(longer) is None, longer
    assert peak_tflops(torch.device("cpu"), "bf16") is None
    assert memory_bytes(torch.device("cpu")) > 2**20


def test_lives_are_counted(tmp_path):
    path = tmp_path / "lives.jsonl"
    assert record_start(path, 0, ranks=2) == 0
    assert record_start(path, 30, ranks=4) == 1
    assert [line.count('"step"') for line in path.read_text().splitlines()] == [1, 1]
    assert code_version()


def test_a_life_that_was_cut_short_while_it_wrote_hides_no_later_one(tmp_path):
    path = tmp_path / "lives.jsonl"
    record_start(path, 0)
    with path.open("a") as stream:
        stream.write('{"step": 10, "ti')
    assert record_start(path, 20) == 1
    assert record_start(path, 30) == 2
    assert [life["step"] for life in read_records(path)] == [0, 20, 30]


def test_a_profile_that_cannot_be_written_is_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    said = []
    with profiled(tmp_path / "tensorboard", said.append) as step:
        for _ in range(8):
            torch.ones(1).add(1)
            step()
    (warning,) = said
    assert warning.startswith("warning: profile: ")
    assert warning.endswith("Training goes on without it.")
