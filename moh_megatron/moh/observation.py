"""Measures entropy, alpha and z-loss of the routers in selected steps.

A hook on each router computes its logits again while the observer is on, and costs nothing while it is off.
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
from moh_megatron.moh.routing import in_groups

OBSERVED = ("z_loss", "entropy", "alpha_shared", "alpha_routed")
"""The measurements of one layer, means over tokens; NaN where a router lacks the quantity.

entropy is that of the routed heads' probabilities over the entropy of uniform ones: 1 if all are equal, 0 if one head
has all probability; with routing groups, the mean over them. alpha is scaled as in the gates, see moh.gating.
"""


class RoutingObserver:
    """Measures the routers of ``layers`` while ``on``; a recomputed forward pass counts once."""

    def __init__(self, layers: Sequence[MoHSelfAttention]) -> None:
        self.on = False
        self._samples: list[list[Tensor]] = [[] for _ in layers]
        for samples, layer in zip(self._samples, layers, strict=True):
            # First of all hooks: ZeRO's stage 3 has one that takes the router's weights away.
            layer.router.register_forward_hook(functools.partial(self._record, samples), prepend=True)

    def _record(self, samples: list[Tensor], router: torch.nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if self.on and router.training and torch.is_grad_enabled():
            assert isinstance(router, Router)
            samples.append(observe(router, *inputs))

    def drain(self) -> Tensor | None:
        """[L, 4] float64: ``OBSERVED`` of each layer, mean over this rank's micro-batches since the last call.

        None if the observer was off. Under sequence parallelism it covers this rank's part of the sequence.
        """
        if not self._samples or not self._samples[0]:
            return None
        means = torch.stack([torch.stack(samples).mean(0) for samples in self._samples])
        for samples in self._samples:
            samples.clear()
        return means


@torch.no_grad()
def observe(router: Router, x: Tensor, q: Tensor) -> Tensor:
    """[4] float64: ``OBSERVED`` of one micro-batch with a router's inputs x and q."""
    logits = router.logits(x, q)
    absent = x.new_full((), math.nan, dtype=torch.float64)
    z = entropy = shared = routed = absent
    if logits.routed is not None:
        values = in_groups(logits.routed, router.heads.groups)
        if isinstance(router, LearnedRouter):
            z = z_loss(values).double()
        if values.shape[-1] > 1:
            token_entropy = values.logsumexp(-1) - (values.softmax(-1) * values).sum(-1)
            entropy = token_entropy.mean().double() / math.log(values.shape[-1])
    if logits.alpha is not None:
        alpha = logits.alpha.softmax(-1).flatten(0, -2).mean(0).double()
        shared, routed = alpha.unbind() if router.moh.gating == "paper" else (2 * alpha).unbind()
    return torch.stack([z, entropy, shared, routed])
