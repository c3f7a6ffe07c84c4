"""What routers do beyond whom they choose, looked at in a few steps: entropy, alpha, z-loss.

A hook on each router, which computes its logits once more where someone looks and costs nothing where nobody does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.moh.losses import z_loss
from moh_megatron.moh.router import LearnedRouter, Router

OBSERVED = ("z_loss", "entropy", "alpha_shared", "alpha_routed")
"""Of a layer, means over tokens; NaN where a router has no such thing.

entropy: of the probabilities the routed heads are weighed by, over that of even ones: 1 where all are alike, 0 where
one has all. alpha: as the gates hold it, see moh.gating.
"""


class RoutingObserver:
    """Looks at the routers of ``layers`` while ``on``; a forward pass that is recomputed counts once."""

    def __init__(self, layers: Sequence[MoHSelfAttention]) -> None:
        self.on = False
        self._seen: list[list[Tensor]] = [[] for _ in layers]
        for seen, layer in zip(self._seen, layers, strict=True):
            layer.router.register_forward_hook(functools.partial(self._look, seen))

    def _look(self, seen: list[Tensor], router: torch.nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if self.on and router.training and torch.is_grad_enabled():
            assert isinstance(router, Router)
            seen.append(observe(router, *inputs))

    def drain(self) -> Tensor | None:
        """[L, 4] float64, ``OBSERVED`` of each layer, the mean over this rank's micro-batches; None: nobody looked.

        Under sequence parallelism of this rank's part of the sequence.
        """
        if not self._seen or not self._seen[0]:
            return None
        means = torch.stack([torch.stack(seen).mean(0) for seen in self._seen])
        for seen in self._seen:
            seen.clear()
        return means


@torch.no_grad()
def observe(router: Router, x: Tensor, q: Tensor) -> Tensor:
    """[4] float64: ``OBSERVED`` of one micro-batch, from a router's inputs."""
    logits = router.logits(x, q)
    absent = x.new_full((), math.nan, dtype=torch.float64)
    z = entropy = shared = routed = absent
    if logits.routed is not None:
        values = logits.routed
        if isinstance(router, LearnedRouter):
            z = z_loss(values).double()
        if values.shape[-1] > 1:
            surprise = values.logsumexp(-1) - (values.softmax(-1) * values).sum(-1)
            entropy = surprise.mean().double() / math.log(values.shape[-1])
    if logits.alpha is not None:
        alpha = logits.alpha.softmax(-1).flatten(0, -2).mean(0).double()
        shared, routed = alpha.unbind() if router.moh.gating == "paper" else (2 * alpha).unbind()
    return torch.stack([z, entropy, shared, routed])
