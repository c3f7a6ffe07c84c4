"""Knows the peak rates of GPUs and reads the memory in use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 150.0,
    "A10": 125.0,
}
"""TFLOP/s of dense bf16 matrix products, from the data sheets of the makers; the first name that matches counts."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """The peak of a known GPU in bf16; None for other devices and precisions."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """bf16 TFLOP/s of the GPU with this name, None where it is unknown."""
    return next((peak for known, peak in _PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def memory_bytes(device: torch.device) -> int:
    """Bytes in use by this process: on a GPU the peak of its tensors since the last call, else the resident memory."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
