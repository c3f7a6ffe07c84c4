"""Which heads a token uses and how much each counts: pure functions, no process group, no Megatron.

Legend: D hidden size, N query heads, E routed heads, H head size; ``...`` any leading shape (tokens).
All arithmetic is fp32 whatever the inputs' precision (float64 for float64). Ties go to the lower head index on every
device.
Source: arXiv 2410.11842, eq. 5-7 and 9-10; where the official code differs the choice is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moh_megatron.moh.losses import BalanceForm, balance_loss
from moh_megatron.moh.precision import at_least_fp32

Gating = Literal["normalized", "paper"]

_LARGEST_NORM = 1e18
"""Its square, and the deviation of such norms, are finite in fp32."""
_SMALLEST_DEVIATION = 1e-18
"""Norms that differ less are equal: the gradient of their score goes with the inverse."""


class Routing(NamedTuple):
    """What a router decides. Heads are in logical order."""

    gates: Tensor
    """[..., N] fp32, the weight of each head's output; 0 where inactive."""
    active: Tensor
    """[..., N] bool, the heads each token uses."""
    balance_loss: Tensor
    """Scalar, before the coefficient beta."""


def token_mean(values: Tensor) -> Tensor:
    """[..., E] -> [E]: the mean over all tokens at hand; 0 where there are none."""
    rows = values.reshape(-1, values.shape[-1]) if values.numel() else values.new_zeros(1, values.shape[-1])
    return rows.mean(0)


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest of the last dimension; ties go to the lower index (torch.topk says no order)."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def _check_top_k(top_k: int, routed: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= routed:
        raise ValueError(f"top_k must be from 1 to the number of routed heads ({routed}). Got {top_k}.")


def _check_form(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {value!r}.")


def _check_finite(name: str, scores: Tensor) -> None:
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"{name} must give finite scores. Got {bad} of {scores.numel()} values that are inf or NaN.")


class Logits(NamedTuple):
    """What a learned router computes from a token, fp32; each [..., rows] or None where there is no such weight."""

    shared: Tensor | None
    routed: Tensor | None
    alpha: Tensor | None


def router_logits(x: Tensor, w_shared: Tensor | None, w_routed: Tensor | None, w_alpha: Tensor | None) -> Logits:
    """x [..., D] times each weight that is there; see ``learned_routing`` for their meaning."""
    x = x.to(at_least_fp32(x.dtype))
    return Logits(*(None if w is None else F.linear(x, w.to(x.dtype)) for w in (w_shared, w_routed, w_alpha)))


def learned_routing(
    x: Tensor,
    w_shared: Tensor | None,
    w_routed: Tensor | None,
    w_alpha: Tensor | None,
    *,
    top_k: int,
    gating: Gating = "normalized",
    balance: BalanceForm = "scaled",
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

    Raises:
        ValueError: top_k out of range, weights that fit neither reading above or not x, or scores that are not finite.
    """
    _check_form("gating", gating, get_args(Gating))
    _check_form("balance", balance, get_args(BalanceForm))
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point numbers [..., D]. Got {x.dtype} {list(x.shape)}.")
    for name, weight, rows in (("w_shared", w_shared, None), ("w_routed", w_routed, None), ("w_alpha", w_alpha, 2)):
        if weight is not None and (weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0):
            raise ValueError(f"{name} must have shape [rows, {x.shape[-1]}], as x has. Got {list(weight.shape)}.")
        if weight is not None and rows is not None and weight.shape[0] != rows:
            raise ValueError(f"{name} must have {rows} rows, shared and routed. Got {weight.shape[0]}.")
    logits = router_logits(x, w_shared, w_routed, w_alpha)
    for values in logits:
        if values is not None:
            _check_finite("x and the weights", values)
    return weigh_heads(logits, top_k=top_k, gating=gating, balance=balance)


def weigh_heads(
    logits: Logits,
    *,
    top_k: int,
    gating: Gating,
    balance: BalanceForm,
    bias: Tensor | None = None,
    mean: Callable[[Tensor], Tensor] = token_mean,
) -> Routing:
    """``learned_routing`` from the logits on, for every step of training: does not look whether they are finite.

    ``bias`` [E] is added to the routed logits for the choice of heads alone. ``mean`` averages [..., E] over tokens;
    sequence parallelism averages over ranks as well.
    """
    if logits.routed is None:
        if logits.shared is None:
            raise ValueError("w_shared and w_routed cannot both be None: there would be no head at all.")
        gates = logits.shared.shape[-1] * logits.shared.softmax(-1)
        return Routing(gates, torch.ones_like(gates, dtype=torch.bool), gates.new_zeros(()))
    if logits.alpha is None and logits.shared is not None:
        raise ValueError("w_alpha must be given where w_shared and w_routed are. Got None.")
    _check_top_k(top_k, logits.routed.shape[-1])

    probability = logits.routed.softmax(-1)
    chosen = top_k_mask(logits.routed if bias is None else logits.routed + bias, top_k)
    if gating == "normalized":
        gates = top_k * logits.routed.masked_fill(~chosen, -torch.inf).softmax(-1)
    else:
        gates = probability * chosen
    active = chosen
    if logits.alpha is not None:
        alpha = logits.alpha.softmax(-1)
        alpha = 2 * alpha if gating == "normalized" else alpha
        shared = torch.ones_like(alpha[..., :1])
        if logits.shared is not None:
            scale = logits.shared.shape[-1] if gating == "normalized" else 1
            shared = scale * logits.shared.softmax(-1)
        gates = torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * gates], -1)
        active = torch.cat([torch.ones_like(shared, dtype=torch.bool), chosen], -1)
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.to(probability.dtype)), balance))


def routed_heads(heads: int, shared_heads: int | Sequence[int] | Tensor) -> list[int]:
    """The heads that are not shared; ``shared_heads`` is a count (the first n) or a list of head indices."""
    if isinstance(shared_heads, Tensor):
        shared_heads = shared_heads.tolist()
    if isinstance(shared_heads, int) and not 0 <= shared_heads <= heads:
        raise ValueError(f"shared_heads must be from 0 to the number of heads ({heads}). Got {shared_heads}.")
    shared = list(range(shared_heads)) if isinstance(shared_heads, int) else list(shared_heads)
    if len(set(shared)) != len(shared) or any(not 0 <= head < heads for head in shared):
        raise ValueError(f"shared_heads must be distinct heads below {heads}. Got {shared_heads}.")
    return sorted(set(range(heads)) - set(shared))


def query_norms(q: Tensor) -> Tensor:
    """L2 norm of each head's query: [..., N, H] -> [..., N], fp32 (float64 for float64), at most ``_LARGEST_NORM``."""
    return torch.linalg.vector_norm(q.to(at_least_fp32(q.dtype)), dim=-1).clamp(max=_LARGEST_NORM)


def norm_scores(norms: Tensor) -> Tensor:
    """Norms [..., E] of the routed heads over their unbiased deviation; 0 where that is as good as 0, or for a single
    head."""
    deviation = norms.std(-1, keepdim=True) if norms.shape[-1] > 1 else torch.zeros_like(norms)
    flat = deviation <= _SMALLEST_DEVIATION
    return norms.masked_fill(flat, 0.0) / deviation.masked_fill(flat, 1.0)


def choose_by_norm(
    norms: Tensor,
    *,
    shared_heads: int | Sequence[int] | Tensor,
    top_k: int,
    balance: BalanceForm,
    bias: Tensor | None = None,
    mean: Callable[[Tensor], Tensor] = token_mean,
) -> Routing:
    """``query_norm_routing`` from the norms [..., N] of all heads on, for every step of training: does not look whether
    they are finite. ``bias`` [E] is added to the scores (``norm_scores``) for the choice of heads alone."""
    routed = routed_heads(norms.shape[-1], shared_heads)
    _check_top_k(top_k, len(routed))
    place = torch.tensor(routed, device=norms.device)
    own = norms.index_select(-1, place)
    scores = norm_scores(own)
    probability = scores.softmax(-1)
    # Without a bias the norms themselves are ranked: dividing them could only round two of them together.
    chosen = top_k_mask(own if bias is None else scores + bias, top_k)
    # Forward exactly 0 or 1; backward as if the gate were the score (straight-through, eq. 9-10).
    quantised = chosen.to(probability.dtype) + (probability - probability.detach())
    gates = torch.ones_like(norms).index_copy(-1, place, quantised)
    active = torch.ones_like(norms, dtype=torch.bool).index_copy(-1, place, chosen)
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.to(probability.dtype)), balance))


def query_norm_routing(
    q: Tensor, *, shared_heads: int | Sequence[int] | Tensor, top_k: int, balance: BalanceForm = "scaled"
) -> Routing:
    """Routing by the norm of each head's query, for continue-tuning (paper, section 3.3 and eq. 9-10).

    ``q`` [..., N, H] is the raw query projection, before RoPE. The top-k routed heads by norm have gate 1, the others
    0, shared heads 1. The score behind a gate is the softmax over the routed heads of norm / unbiased standard
    deviation (uniform where that is zero; the official code gives NaN); it is the P of the balance loss, and carries
    the straight-through gradient: multiply the gates with the outputs of all heads and every gate gets it, or with
    those of the active heads (zero elsewhere, as ``sparse_attention`` leaves them) and a skipped head's gate gets none.

    Raises:
        ValueError: top_k or shared_heads out of range, or queries that are not finite.
    """
    _check_form("balance", balance, get_args(BalanceForm))
    if q.dim() < 2 or not q.is_floating_point():
        raise ValueError(f"q must be floating-point numbers [..., N, H]. Got {q.dtype} {list(q.shape)}.")
    _check_finite("q", q)
    norms = query_norms(q)
    return choose_by_norm(norms, shared_heads=shared_heads, top_k=top_k, balance=balance)
