"""Chooses the fastest backend for a shape from measurements, which are recorded here.

Forward + backward over dense causal SDPA with the same mask, fp32, one CPU thread, an AMD EPYC with AVX-512,
`tools/bench_attention.py`; medians of ratios. Below 1 the sparse backend is faster. More in `docs/benchmarks.md`.

| S | heads / groups x size | cpu 50, 75, 100 % | gathered 50, 75, 100 % |
|---|---|---|---|
| 512 | 12 / 12 x 64 | 0.44, 0.59, 0.75 | 0.67, 0.85, 1.07 |
| 512 | 32 / 8 x 128 | 0.31, 0.45, 0.55 | 0.40, 0.54, 0.62 |
| 1024 | 12 / 12 x 64 | 0.43, 0.59, 0.78 | 0.57, 0.78, 0.95 |
| 1024 | 32 / 8 x 128 | 0.39, 0.57, 0.70 | 0.45, 0.65, 0.82 |
| 2048 | 12 / 12 x 64 | 0.43, 0.64, 0.83 | 0.62, 0.79, 0.97 |
| 2048 | 16 / 4 x 128 | 0.41, 0.64, 0.80 | 0.52, 0.78, 0.90 |
| 4096 | 4 / 4 x 64 | 0.48, 0.67, 0.89 | 0.74, 0.95, 1.20 |
| 4096 | 4 / 1 x 128 | 0.47, 0.68, 0.86 | 0.52, 0.93, 1.02 |
| 8192 | 4 / 4 x 64 | 0.52, 0.74, 0.93 | 0.69, 0.98, 1.23 |

gathered at 256, 12 / 12 x 64: 1.13 and 1.45 at 50 and 75 %; cpu at 256, 8 / 4 x 16: 0.87 and 1.12.

| S | heads / groups x size | cpu 25, 50, 67, 83, 100 % |
|---|---|---|
| 128 | 12 / 12 x 64 | 0.78, 0.97, 1.14, 1.29, 1.52 |
| 128 | 32 / 8 x 128 | 0.33, 0.56, 0.64, 0.77, 0.89 |
| 256 | 12 / 12 x 64 | 0.48, 0.72, 0.83, 0.95, 1.08 |
| 256 | 32 / 8 x 128 | 0.23, 0.42, 0.53, 0.62, 0.70 |

With every head active, dense attention is chosen although the C++ kernel is often faster: the model then equals the
dense one bit for bit and needs less memory. Shares between 75 and 100 % were measured up to a length of 1024. Several
threads and GPUs were not measured, so dense is chosen for them.
"""

from __future__ import annotations

from typing import Literal

import torch

from moh_megatron.moh.backends import cpu

Backend = Literal["dense", "slots", "gathered", "cpu", "triton"]

_PAYS: dict[Backend, tuple[tuple[int, float], ...]] = {
    "cpu": ((256, 0.6), (512, 0.9)),
    "gathered": ((512, 0.8),),
}
"""(shortest length, largest share of active pairs) at which a backend is faster than dense attention."""


def _pays(backend: Backend, length: int, share: float) -> bool:
    return any(length >= shortest and share <= largest for shortest, largest in _PAYS[backend])


def choose_backend(
    *, length: int, share: float, dtype: torch.dtype, device: torch.device, even: bool = False
) -> Backend:
    """The fastest backend for documents of ``length`` of which ``share`` of the (token, head) pairs are active.

    ``even``: every token has the same number of active heads in every KV group.
    """
    without_lists: Backend = "slots" if even and share < 1 else "dense"
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return without_lists
    if _pays("cpu", length, share) and cpu.available(dtype, device):
        return "cpu"
    return "gathered" if without_lists == "dense" and _pays("gathered", length, share) else without_lists
