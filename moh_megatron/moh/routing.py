"""Which heads a token uses and how much each counts: pure functions, no process group, no Megatron.

Legend: D hidden size, N query heads, E routed heads, H head size; ``...`` any leading shape (tokens).
All arithmetic is fp32 whatever the inputs' precision. Ties go to the lower head index on every device.
Source: arXiv 2410.11842, eq. 5-7 and 9-10; where the official code differs the choice is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moh_megatron.moh.losses import BalanceForm, balance_loss

Gating = Literal["normalized", "paper"]


class Routing(NamedTuple):
    """What a router decides. Heads are in logical order."""

    gates: Tensor
    """[..., N] fp32, the weight of each head's output; 0 where inactive."""
    active: Tensor
    """[..., N] bool, the heads each token uses."""
    balance_loss: Tensor
    """Scalar, before the coefficient beta."""


def token_mean(values: Tensor) -> Tensor:
    """[..., E] -> [E]: the mean over all tokens at hand."""
    return values.reshape(-1, values.shape[-1]).mean(0)


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest of the last dimension; ties go to the lower index (torch.topk says no order)."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _check_top_k(top_k: int, routed: int) -> None:
    if not 1 <= top_k <= routed:
        raise ValueError(f"top_k must be from 1 to the number of routed heads ({routed}). Got {top_k}.")


def learned_routing(
    x: Tensor,
    w_shared: Tensor | None,
    w_routed: Tensor | None,
    w_alpha: Tensor | None,
    *,
    top_k: int,
    gating: Gating = "normalized",
    balance: BalanceForm = "scaled",
    mean: Callable[[Tensor], Tensor] = token_mean,
) -> Routing:
    """The two-stage router (eq. 5-6): which heads, and how shared and routed heads are weighed against each other.

    Args:
        x: attention input [..., D].
        w_shared: [n_shared, D]; None with ``w_alpha`` given means one shared head, weighed by alpha alone.
        w_routed: [E, D]; None means shared heads only, gates n_shared * softmax, balance loss 0.
        w_alpha: [2, D], row 0 shared, row 1 routed; None means there is no shared head, or no routed one.
        top_k: routed heads a token uses.
        gating: ``normalized`` is the official code (every active gate 1 at uniform logits); ``paper`` is eq. 5-6.
        balance: form of the balance loss, see ``losses.balance_loss``.
        mean: how [..., E] is averaged over tokens; sequence parallelism averages over ranks as well.

    Raises:
        ValueError: top_k out of range, or weights that fit neither reading above.
    """
    x = x.float()
    if w_routed is None:
        if w_shared is None:
            raise ValueError("w_shared and w_routed cannot both be None: there would be no head at all.")
        gates = w_shared.shape[0] * F.linear(x, w_shared.float()).softmax(-1)
        return Routing(gates, torch.ones_like(gates, dtype=torch.bool), x.new_zeros(()))
    if w_alpha is None and w_shared is not None:
        raise ValueError("w_alpha must be given where w_shared and w_routed are. Got None.")
    _check_top_k(top_k, w_routed.shape[0])

    logits = F.linear(x, w_routed.float())
    probability = logits.softmax(-1)
    chosen = top_k_mask(logits, top_k)
    if gating == "normalized":
        gates = top_k * logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    else:
        gates = probability * chosen
    active = chosen
    if w_alpha is not None:
        alpha = F.linear(x, w_alpha.float()).softmax(-1)
        alpha = 2 * alpha if gating == "normalized" else alpha
        shared = x.new_ones(*x.shape[:-1], 1)
        if w_shared is not None:
            scale = w_shared.shape[0] if gating == "normalized" else 1
            shared = scale * F.linear(x, w_shared.float()).softmax(-1)
        gates = torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * gates], -1)
        active = torch.cat([torch.ones_like(shared, dtype=torch.bool), chosen], -1)
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.float()), balance))


def routed_heads(heads: int, shared_heads: int | Sequence[int]) -> list[int]:
    """The heads that are not shared; ``shared_heads`` is a count (the first n) or a list of head indices."""
    if isinstance(shared_heads, int) and not 0 <= shared_heads <= heads:
        raise ValueError(f"shared_heads must be from 0 to the number of heads ({heads}). Got {shared_heads}.")
    shared = list(range(shared_heads)) if isinstance(shared_heads, int) else list(shared_heads)
    if len(set(shared)) != len(shared) or any(not 0 <= head < heads for head in shared):
        raise ValueError(f"shared_heads must be distinct heads below {heads}. Got {shared_heads}.")
    return [head for head in range(heads) if head not in set(shared)]


def query_norms(q: Tensor) -> Tensor:
    """L2 norm of each head's query: [..., N, H] -> [..., N], fp32."""
    return torch.linalg.vector_norm(q.float(), dim=-1)


def norm_routing(
    norms: Tensor,
    *,
    shared_heads: int | Sequence[int],
    top_k: int,
    balance: BalanceForm = "scaled",
    mean: Callable[[Tensor], Tensor] = token_mean,
) -> Routing:
    """Routing without parameters from the norms [..., N] of all heads' queries; see ``query_norm_routing``."""
    routed = routed_heads(norms.shape[-1], shared_heads)
    _check_top_k(top_k, len(routed))
    scores = norms[..., routed]
    deviation = scores.std(-1, keepdim=True) if len(routed) > 1 else torch.zeros_like(scores)
    flat = deviation <= 0
    probability = (scores.masked_fill(flat, 0.0) / deviation.masked_fill(flat, 1.0)).softmax(-1)
    chosen = top_k_mask(scores, top_k)
    # Forward exactly 0 or 1; backward as if the gate were the score (straight-through, eq. 9-10).
    quantised = chosen.float() + (probability - probability.detach())
    gates = torch.ones_like(norms).index_copy(-1, torch.tensor(routed, device=norms.device), quantised)
    active = torch.ones_like(norms, dtype=torch.bool)
    active[..., routed] = chosen
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.float()), balance))


def query_norm_routing(
    q: Tensor, *, shared_heads: int | Sequence[int], top_k: int, balance: BalanceForm = "scaled"
) -> Routing:
    """Routing by the norm of each head's query, for continue-tuning (paper, section 3.3 and eq. 9-10).

    ``q`` [..., N, H] is the raw query projection, before RoPE. The top-k routed heads by norm have gate 1, the others
    0, shared heads 1. The score behind a gate is the softmax over the routed heads of norm / unbiased standard
    deviation (uniform where that is zero; the official code gives NaN); it is the P of the balance loss, and carries
    the straight-through gradient.
    """
    return norm_routing(query_norms(q), shared_heads=shared_heads, top_k=top_k, balance=balance)
