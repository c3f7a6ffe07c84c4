"""Places attention heads on ranks: logical head <-> (tensor-parallel rank, local slot).

Megatron-core gives each tensor-parallel rank a contiguous slice of KV groups. With the shared heads first, as the paper
numbers them, the low ranks would get all of them: at TP 2 rank 0 would work at 100 %, rank 1 hardly at all. The
interleaved placement reorders the groups so that the slices, at every tensor-parallel size that divides the number of
groups, hold shares of the first n groups that are as equal as complete groups allow.

The order does not depend on the tensor-parallel size, so a checkpoint needs no reordering to change the size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Placement = Literal["interleaved", "contiguous"]

LARGEST_IMBALANCE = 1.1
"""A report warns if the busiest rank's heads over the mean exceed this."""


def inverse(order: Sequence[int]) -> list[int]:
    """The inverse of ``order``, a permutation of 0 .. n - 1."""
    return sorted(range(len(order)), key=order.__getitem__)


@functools.cache
def _interleaved(count: int) -> tuple[int, ...]:
    """A permutation of range(count): each number in turn takes the position whose slices, of every size, have fewest.

    For a power of two this is bit reversal.
    """
    sizes = [size for size in range(2, count + 1) if count % size == 0]
    taken = {size: [0] * size for size in sizes}
    placed: dict[int, int] = {}
    for number in range(count):
        free = (position for position in range(count) if position not in placed)
        position = min(free, key=lambda index: (sum(taken[size][index * size // count] for size in sizes), index))
        placed[position] = number
        for size in sizes:
            taken[size][position * size // count] += 1
    return tuple(placed[position] for position in range(count))


@dataclass(frozen=True)
class HeadLayout:
    """The placement of ``heads`` query heads in ``groups`` KV groups.

    A *logical* head is the head's number in the router, the exported model and every figure. Its *physical* position is
    its row block in ``linear_qkv``, counted over all tensor-parallel ranks.
    """

    heads: int
    groups: int
    placement: Placement = "interleaved"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"groups must divide heads ({self.heads}). Got {self.groups}.")
        if self.placement not in get_args(Placement):
            raise ValueError(f"placement must be one of {', '.join(get_args(Placement))}. Got {self.placement!r}.")

    @cached_property
    def group_order(self) -> tuple[int, ...]:
        """The logical KV group at each physical position."""
        if self.placement == "contiguous":
            return tuple(range(self.groups))
        return _interleaved(self.groups)

    @cached_property
    def head_order(self) -> tuple[int, ...]:
        """The logical head at each physical position."""
        width = self.heads // self.groups
        return tuple(group * width + slot for group in self.group_order for slot in range(width))

    def expected_load(self, shared_heads: int | Sequence[int], active_heads: int, world_size: int) -> list[float]:
        """The heads each tensor-parallel rank computes for a token, if routed heads are chosen evenly.

        ``shared_heads`` is a count (the first n) or a list of logical heads; ``active_heads`` includes them.
        """
        listed = list(range(shared_heads)) if isinstance(shared_heads, int) else list(shared_heads)
        shared, routed = set(listed), self.heads - len(listed)
        if len(shared) != len(listed) or not shared <= set(range(self.heads)):
            raise ValueError(f"shared_heads must be distinct heads below {self.heads}. Got {shared_heads}.")
        if not max(1, len(shared)) <= active_heads <= self.heads:
            raise ValueError(
                f"active_heads must be from the {len(shared)} shared heads, and 1, to {self.heads}. Got {active_heads}."
            )
        chance = (active_heads - len(shared)) / routed if routed else 0.0
        ranks = (self.local_heads(rank, world_size) for rank in range(world_size))
        return [sum(1.0 if head in shared else chance for head in heads) for heads in ranks]

    def imbalance(self, shared_heads: int | Sequence[int], active_heads: int, world_size: int) -> float:
        """The busiest rank's heads over the mean: the slowdown of each layer."""
        load = self.expected_load(shared_heads, active_heads, world_size)
        return max(load) * world_size / sum(load)

    @property
    def remedy(self) -> str:
        """The advice that balances the ranks at every tensor-parallel size."""
        return (
            f"as many shared heads in each of the {self.groups} KV groups would even it out: "
            f"moh.shared_placement=spread, with moh.shared_heads a multiple of {self.groups}"
        )

    @property
    def evenness(self) -> str:
        """What routing in KV groups promises of the ranks' loads, whatever the routers choose."""
        return f"even at every tensor-parallel size: equally many active heads in each of {self.groups} KV groups"

    def report(self, shared_heads: int | Sequence[int], active_heads: int, in_use: int | None = None) -> str:
        """A line for each tensor-parallel size up to 8 that divides the KV groups: load of each rank and imbalance.

        Uneven sizes also get the remedy. If ``in_use`` is given, that size alone has a line.
        """
        lines = []
        sizes = [size for size in range(1, 9) if self.groups % size == 0] if in_use is None else [in_use]
        for size in sizes:
            load = self.expected_load(shared_heads, active_heads, size)
            uneven = self.imbalance(shared_heads, active_heads, size)
            lines.append(
                f"TP {size}: {', '.join(f'{heads:.2f}' for heads in load)} heads a token on each rank, "
                f"max / mean {uneven:.2f}{f' - uneven; {self.remedy}' if uneven > LARGEST_IMBALANCE else ''}"
            )
        return "\n".join(lines)

    def local_heads(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The logical heads of one tensor-parallel rank, in local order."""
        if self.groups % world_size:
            raise ValueError(f"world_size must divide groups ({self.groups}). Got {world_size}.")
        share = self.heads // world_size
        return self.head_order[rank * share : (rank + 1) * share]
