#!/usr/bin/env python
"""Measures what skipping inactive heads saves in an exported model's prefill.

.venv/bin/python tools/bench_prefill.py --threads 1

It times the forward pass of one attention layer of the exported code in fp32. The printed numbers are the ratio of the
sparse path's time to the dense one's, median and range over turns: for heads chosen in the whole layer, then for heads
chosen within KV groups, which are computed in slots.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from timing import circumstances, markdown, median_and_range, ratios, take_turns

from moh_megatron.checkpoint.hf.hf_model.modeling_moh import Slots, attend_active, gated

SHAPES = ((12, 12, 64), (32, 8, 64), (9, 3, 64))
LENGTHS = (256, 512, 1024, 2048)
SHARES = (0.5, 0.75, 0.9)
GROUPED_SHAPE = (32, 8, 64)
SLOTS = (2, 3)


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


def slot_times(heads: int, groups: int, size: int, length: int, slots: int, turns: int) -> str:
    """Time in slots over dense time, for one sequence whose tokens choose ``slots`` heads of each group at random."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, length, heads, size, generator=generator).transpose(1, 2)
    key, value = (torch.randn(1, groups, length, size, generator=generator) for _ in range(2))
    rank = torch.rand(1, length, groups, heads // groups, generator=generator).argsort(-1)
    gates = (rank < slots).float().flatten(2)

    def attend(query: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    def dense() -> None:
        gated(attend(query), gates)

    def in_slots() -> None:
        held = Slots(gates, groups, slots)
        out = attend(held.take(query.transpose(1, 2)).transpose(1, 2))
        held.put(gated(out, held.take(gates)))

    measured = take_turns({"slots": in_slots, "dense": dense}, turns)
    return median_and_range(ratios(measured, "slots", "dense"))


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
        heads, groups, size = GROUPED_SHAPE
        in_slots = [
            (
                f"{heads} / {groups} x {size}",
                length,
                *(slot_times(*GROUPED_SHAPE, length, slots, arguments.turns) for slots in SLOTS),
            )
            for length in LENGTHS
        ]
    print(markdown(["heads / groups x size", "length", *(f"{share:.0%}" for share in SHARES)], rows))
    print(markdown(["in slots", "length", *(f"{slots} of {heads // groups}" for slots in SLOTS)], in_slots))


if __name__ == "__main__":
    main()
