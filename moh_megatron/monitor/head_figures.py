"""Computes figures of the heads from how many tokens used each: dead heads, evenness, imbalance between ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moh_megatron.config.layer_heads import LayerHeads

DEAD = 0.1
"""A routed head is dead where its load is below this share of its fair load."""
_CELL = 12
"""Pixels of a head in the heat map."""


@dataclass(frozen=True)
class HeadFigures:
    """The heads in one interval; L layers, N heads, in logical order."""

    load: Tensor
    """[L, N] share of tokens that used each head."""
    relative: list[list[float]]
    """For each layer, load over fair load of each routed head: 1 everywhere where the load is even."""
    routed: list[tuple[int, ...]]
    """For each layer, the routed heads."""
    load_entropy: list[float]
    """For each layer, entropy of the load over the routed heads, over that of an even load; NaN without a choice. With
    routing groups, the mean over them."""
    groups: int
    """The routing groups of consecutive heads: a token uses equally many heads in each."""
    rank_imbalance: list[float]
    """For each layer, the heads of the busiest tensor-parallel rank over the mean."""

    def dead_share(self, layer: int) -> float:
        """Share of the routed heads of a layer that are dead."""
        relative = self.relative[layer]
        return sum(load < DEAD for load in relative) / len(relative) if relative else 0.0


def head_figures(
    load: Tensor, layers: Sequence[LayerHeads], top_k: Sequence[int], ranks: Sequence[Sequence[int]]
) -> HeadFigures:
    """Compute the figures.

    Args:
        load: [L, N] share of tokens that used each head.
        top_k: number of routed heads per token in each layer at this step.
        ranks: the logical heads of each tensor-parallel rank.
    """
    relative, entropy, imbalance = [], [], []
    for heads, k, shares in zip(layers, top_k, load.tolist(), strict=True):
        routed = [shares[head] for head in heads.routed]
        relative.append([share * len(routed) / k for share in routed])
        width = len(routed) // heads.groups
        in_groups = [routed[group * width : (group + 1) * width] for group in range(heads.groups)]
        entropy.append(math.fsum(map(_evenness, in_groups)) / heads.groups)
        work = [sum(shares[head] for head in local) for local in ranks]
        imbalance.append(max(work) * len(work) / sum(work) if sum(work) else 1.0)
    return HeadFigures(load, relative, [heads.routed for heads in layers], entropy, layers[0].groups, imbalance)


def _evenness(loads: Sequence[float]) -> float:
    total = sum(loads)
    if len(loads) < 2 or total == 0:
        return math.nan
    shares = [load / total for load in loads if load > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(loads))


def balance_excess(balance: float, layers: Sequence[LayerHeads], top_k: Sequence[int], form: str) -> float:
    """Position of a balance loss, the mean over layers, between an even load (0) and the same heads for all tokens (1).

    ``form`` as in moh.balance_loss. 0 where no layer has a choice.
    """
    even, collapsed = 0.0, 0.0
    for heads, k in zip(layers, top_k, strict=True):
        routed, k = len(heads.routed) // heads.groups, k // heads.groups
        if routed:
            even += k if form == "scaled" else k / routed
            collapsed += routed if form == "scaled" else 1.0
    even, collapsed = even / len(layers), collapsed / len(layers)
    return (balance - even) / (collapsed - even) if collapsed > even else 0.0


def heat_map(load: Tensor, groups: int = 1) -> np.ndarray:
    """uint8 [height, width, 1]: a row of squares per layer, the first one on top; white is no token, black is all.

    Thick lines separate ``groups`` of consecutive heads.
    """
    shade = (255 * (1 - load.double().clamp(0, 1).numpy())).round().astype(np.uint8)
    cells = np.kron(shade, np.ones((_CELL, _CELL), dtype=np.uint8))
    cells[::_CELL, :] = cells[:, ::_CELL] = 128
    width = cells.shape[1] // groups
    for line in range(width, groups * width, width):
        cells[:, line - 1 : line + 2] = 128
    return cells[..., None]
