"""Which backend serves a shape, from what was measured. One place for the figures.

Forward + backward over dense causal SDPA with the same mask, fp32, one CPU thread, an AMD EPYC with AVX-512,
`tools/bench_attention.py`; medians of interleaved pairs. Below 1 the sparse backend is faster.

| S | heads / groups x size | active | cpu | gathered |
|---|---|---|---|---|
| 128 | 8 / 4 x 16 | 50 %, 75 % | 0.96, 1.28 | 1.99, 2.68 |
| 256 | 8 / 4 x 16 | 50 %, 75 % | 0.62, 0.77 | 1.19, 1.55 |
| 512 | 12 / 12 x 64 | 50 %, 75 % | 0.43, 0.54 | 0.56, 0.74 |
| 1024 | 12 / 12 x 64 | 50 %, 75 % | 0.47, 0.64 | 0.59, 0.85 |
| 2048 | 8 / 2 x 128 | 50 %, 75 % | 0.42, 0.66 | 0.49, 0.81 |

Several threads, and GPUs, were not measured: dense is taken there.
"""

from __future__ import annotations

from typing import Literal

import torch

from moh_megatron.moh.backends import cpu

Backend = Literal["dense", "gathered", "cpu", "triton"]

_PAYS: dict[Backend, tuple[tuple[int, float], ...]] = {
    "cpu": ((256, 0.6), (512, 0.9)),
    "gathered": ((512, 0.8),),
}
"""From which length on a backend pays, up to which active share."""


def _pays(backend: Backend, length: int, share: float) -> bool:
    return any(length >= shortest and share <= largest for shortest, largest in _PAYS[backend])


def choose_backend(*, length: int, share: float, dtype: torch.dtype, device: torch.device) -> Backend:
    """The fastest backend for documents of ``length`` of which ``share`` of the (token, head) pairs are active."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return "dense"
    if _pays("cpu", length, share) and cpu.available(dtype, device):
        return "cpu"
    return "gathered" if _pays("gathered", length, share) else "dense"
