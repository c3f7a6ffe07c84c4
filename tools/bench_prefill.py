#!/usr/bin/env python
"""Measures what skipping inactive heads saves in an exported model's prefill.

.venv/bin/python tools/bench_prefill.py --threads 1

It times the forward pass of one attention layer of the exported code in fp32. The printed numbers are the ratio of the
sparse path's time to the dense one's, median and range over turns.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timing import circumstances, markdown, median_and_range, ratios, take_turns

from moh_megatron.checkpoint.hf.hf_model.modeling_moh import attend_active

SHAPES = ((12, 12, 64), (32, 8, 64), (9, 3, 64))
LENGTHS = (256, 512, 1024, 2048)
SHARES = (0.5, 0.75, 0.9)


def times(heads: int, groups: int, size: int, length: int, share: float, turns: int) -> str:
    """Sparse over dense time, for one sequence whose tokens choose ``share`` of the heads at random."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, count, length, size, generator=generator) for count in (heads, groups, groups))
    active = torch.rand(1, length, heads, generator=generator).argsort(-1).argsort(-1) < round(share * heads)

    def dense() -> None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out.transpose(1, 2).contiguous()

    def sparse() -> None:
        attend_active(query, key, value, active, size**-0.5)

    measured = take_turns({"sparse": sparse, "dense": dense}, turns)
    return median_and_range(ratios(measured, "sparse", "dense"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the sparse prefill of exported models against the dense one.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(circumstances())
    with torch.inference_mode():
        rows = [
            (
                f"{heads} / {groups} x {size}",
                length,
                *(times(*shape, length, share, arguments.turns) for share in SHARES),
            )
            for shape in SHAPES
            for heads, groups, size in [shape]
            for length in LENGTHS
        ]
    print(markdown(["heads / groups x size", "length", *(f"{share:.0%}" for share in SHARES)], rows))


if __name__ == "__main__":
    main()
