"""Seconds per part of a step, known GPUs, and the profiler."""

import time

import pytest
import torch

from moh_megatron.monitor.device import known_peak, memory_bytes, peak_tflops
from moh_megatron.monitor.profile import profiled
from moh_megatron.monitor.timer import StepTimer


def test_seconds_of_a_part_add_up_until_they_are_read():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        with timer.part("forward"):
            time.sleep(0.02)
    assert list(timer.iterate("data", iter([1, 2]))) == [1, 2]
    seconds = timer.drain()
    assert 0.04 <= seconds["forward"] < 0.4
    assert 0 <= seconds["data"] < 0.02
    assert timer.drain() == {}


@pytest.mark.gpu
def test_on_a_gpu_the_time_of_the_device_counts():
    device = torch.device("cuda")
    timer = StepTimer(device)
    x = torch.randn(4096, 4096, device=device)
    with timer.part("forward"):
        for _ in range(20):
            x = x @ x / 4096
    torch.cuda.synchronize()
    assert timer.drain()["forward"] > 1e-3


def test_known_gpus():
    assert known_peak("NVIDIA H100 80GB HBM3") == 989.0
    assert known_peak("NVIDIA H100 PCIe") == 756.0
    assert known_peak("NVIDIA A100-SXM4-40GB") == 312.0
    assert known_peak("NVIDIA GH200 480GB") == 989.0
    assert known_peak("something else") is None
    for longer in ("NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA A10G", "NVIDIA A1000"):
        assert known_peak(longer) is None, longer
    assert peak_tflops(torch.device("cpu"), "bf16") is None
    assert memory_bytes(torch.device("cpu")) > 2**20


def test_a_profile_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    with profiled(tmp_path / "tensorboard") as step:
        for _ in range(8):
            torch.ones(1).add(1)
            step()
    (record,) = [record for record in caplog.records if record.name.startswith("moh_megatron")]
    assert record.levelname == "WARNING"
    assert record.message.startswith("profile: ")
    assert record.message.endswith("Training goes on without it.")
