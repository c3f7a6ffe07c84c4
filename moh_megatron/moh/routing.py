"""Routing as pure functions: which heads a token uses and how its outputs are weighted. Needs no process group.

Legend: D hidden size, N query heads, E routed heads, G routing groups, H head size; ``...`` any leading shape (tokens).
With G > 1 a token chooses top_k / G of the E / G routed heads in each group of N / G consecutive heads (ours; the paper
has one group). Scores of routed heads are listed group by group.
All arithmetic is fp32 for every precision of the inputs (float64 for float64). Ties go to the lower head index on every
device.
Source: arXiv 2410.11842, eq. 5-7 and 9-10; where the official code differs, an argument selects the form.
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
GateSoftmax = Literal["layer", "group"]

_LARGEST_NORM = 1e18
"""The square of this norm, and the deviation of such norms, are finite in fp32."""
_SMALLEST_DEVIATION = 1e-18
"""Norms with a smaller deviation count as equal: the gradient of their score is proportional to its inverse."""


class Routing(NamedTuple):
    """The decision of a router, with heads in logical order."""

    gates: Tensor
    """[..., N] fp32, the weight of each head's output; 0 where inactive."""
    active: Tensor
    """[..., N] bool, the heads each token uses."""
    balance_loss: Tensor
    """Scalar, without the coefficient beta."""


def token_mean(values: Tensor) -> Tensor:
    """[..., E] -> [E]: the mean over all tokens; 0 without tokens."""
    by_token = values.reshape(-1, values.shape[-1]) if values.numel() else values.new_zeros(1, values.shape[-1])
    return by_token.mean(0)


def top_k_mask(scores: Tensor, top_k: int) -> Tensor:
    """True at the ``top_k`` largest of the last dimension; ties go to the lower index, unlike torch.topk."""
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def in_groups(values: Tensor, groups: int) -> Tensor:
    """[..., E] -> [..., G, E / G]."""
    return values.unflatten(-1, (groups, -1))


def _check_top_k(top_k: int, routed: int, groups: int) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= routed:
        raise ValueError(f"top_k must be from 1 to the number of routed heads ({routed}). Got {top_k}.")
    if top_k % groups:
        raise ValueError(f"top_k must be a multiple of routing_groups ({groups}). Got {top_k}.")


def _check_groups(groups: int, **counts: int) -> None:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"routing_groups must be a whole number above 0. Got {groups!r}.")
    for name, count in counts.items():
        if count % groups:
            raise ValueError(f"routing_groups ({groups}) must divide the number of {name}. Got {count}.")


def _check_form(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {value!r}.")


def _check_finite(name: str, scores: Tensor) -> None:
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise ValueError(f"{name} must give finite scores. Got {bad} of {scores.numel()} values that are inf or NaN.")


class Logits(NamedTuple):
    """A learned router's logits in fp32, each [..., rows of its weight]; None for an absent weight."""

    shared: Tensor | None
    routed: Tensor | None
    alpha: Tensor | None


def router_logits(x: Tensor, w_shared: Tensor | None, w_routed: Tensor | None, w_alpha: Tensor | None) -> Logits:
    """x [..., D] times each weight that is not None; ``learned_routing`` explains the weights."""
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
    routing_groups: int = 1,
    gate_softmax: GateSoftmax = "layer",
) -> Routing:
    """The two-stage router (eq. 5-6): chooses heads, and weights shared against routed heads.

    Args:
        x: attention input [..., D].
        w_shared: [n_shared, D]; None with ``w_alpha`` given means one shared head, weighted by alpha alone.
        w_routed: [E, D]; None means shared heads only, with gates n_shared * softmax and balance loss 0.
        w_alpha: [2, D], row 0 shared, row 1 routed; None means there is no shared head, or no routed one.
        top_k: routed heads a token uses, in all groups together.
        gating: ``normalized`` is the official code (every active gate 1 at uniform logits); ``paper`` is eq. 5-6.
        balance: the form of the balance loss, see ``losses.balance_loss``.
        routing_groups: G. With G = 1 the result lists shared heads first; with more it lists each group's shared heads
            before its routed ones. Rows of ``w_shared`` and ``w_routed`` follow group by group.
        gate_softmax: with G > 1, the heads that share one softmax of gates, see ``weigh_heads``.

    Raises:
        ValueError: top_k is out of range, weights do not match each other or x, the heads do not divide evenly over the
            groups, or scores are not finite.
    """
    _check_form("gating", gating, get_args(Gating))
    _check_form("gate_softmax", gate_softmax, get_args(GateSoftmax))
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
    single = int(logits.shared is None and logits.routed is not None and logits.alpha is not None)
    shared = single if logits.shared is None else logits.shared.shape[-1]
    _check_groups(
        routing_groups, **{"shared heads": shared, "routed heads": 0 if w_routed is None else w_routed.shape[0]}
    )
    routing = weigh_heads(
        logits, top_k=top_k, gating=gating, balance=balance, groups=routing_groups, gate_softmax=gate_softmax
    )
    if routing_groups == 1:
        return routing
    gates, active = (_group_by_group(values, shared, routing_groups) for values in (routing.gates, routing.active))
    return Routing(gates, active, routing.balance_loss)


def _group_by_group(values: Tensor, shared: int, groups: int) -> Tensor:
    """[..., N], shared heads first -> [..., N], each group's shared heads and then its routed ones."""
    parts = values.split([shared, values.shape[-1] - shared], -1)
    return torch.cat([in_groups(part, groups) for part in parts if part.shape[-1]], -1).flatten(-2)


def weigh_heads(
    logits: Logits,
    *,
    top_k: int,
    gating: Gating,
    balance: BalanceForm,
    bias: Tensor | None = None,
    mean: Callable[[Tensor], Tensor] = token_mean,
    groups: int = 1,
    gate_softmax: GateSoftmax = "layer",
) -> Routing:
    """``learned_routing`` from logits, for training: does not check that they are finite. Shared heads come first.

    ``bias`` [E] is added to the routed logits for the selection of heads only. ``mean`` averages [..., E] over tokens;
    under sequence parallelism it averages over ranks as well. Heads are chosen, and the balance loss is computed, with
    the softmax of each group. Gates of shared and of routed heads come from the softmax over those of the layer, or,
    with ``gate_softmax`` group, over those of each group.
    """
    if logits.routed is None:
        if logits.shared is None:
            raise ValueError("w_shared and w_routed cannot both be None: there would be no head at all.")
        gates = _scaled_softmax(logits.shared, logits.shared.shape[-1], groups if gate_softmax == "group" else 1)
        return Routing(gates, torch.ones_like(gates, dtype=torch.bool), gates.new_zeros(()))
    if logits.alpha is None and logits.shared is not None:
        raise ValueError("w_alpha must be given where w_shared and w_routed are. Got None.")
    _check_top_k(top_k, logits.routed.shape[-1], groups)

    gate_groups = groups if gate_softmax == "group" else 1
    probability = in_groups(logits.routed, groups).softmax(-1).flatten(-2)
    chosen = choose(logits.routed if bias is None else logits.routed + bias, top_k, groups)
    if gating == "normalized":
        gates = _scaled_softmax(logits.routed.masked_fill(~chosen, -torch.inf), top_k, gate_groups)
    else:
        gates = (probability if gate_groups == groups else logits.routed.softmax(-1)) * chosen
    active = chosen
    if logits.alpha is not None:
        alpha = logits.alpha.softmax(-1)
        alpha = 2 * alpha if gating == "normalized" else alpha
        shared = torch.ones_like(alpha[..., :1])
        if logits.shared is not None:
            scale = logits.shared.shape[-1] if gating == "normalized" else gate_groups
            shared = _scaled_softmax(logits.shared, scale, gate_groups)
        gates = torch.cat([alpha[..., :1] * shared, alpha[..., 1:] * gates], -1)
        active = torch.cat([torch.ones_like(shared, dtype=torch.bool), chosen], -1)
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.to(probability.dtype)), balance, groups))


def choose(scores: Tensor, top_k: int, groups: int) -> Tensor:
    """Scores [..., E] -> bool [..., E], true at the top_k / G largest of each group."""
    return top_k_mask(in_groups(scores, groups), top_k // groups).flatten(-2)


def _scaled_softmax(logits: Tensor, scale: int, groups: int) -> Tensor:
    """The softmax over each of ``groups`` parts of the last dimension, times ``scale`` / ``groups``."""
    return scale // groups * in_groups(logits, groups).softmax(-1).flatten(-2)


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


def norm_scores(norms: Tensor, groups: int = 1) -> Tensor:
    """Norms [..., E] of routed heads over their unbiased deviation; 0 if the deviation is nearly 0 or E is 1.

    With routing groups each has a deviation of its own, and the scores are of distances to its mean. The softmax is the
    same. The scores of two heads in a group are the same whatever their norms, so they have no gradient: rounding
    errors in its place would train the queries, and Adam would make them large.
    """
    norms = in_groups(norms, groups)
    if groups > 1 and norms.shape[-1] == 2:
        return (norms - norms.flip(-1)).sign().mul(0.5**0.5).flatten(-2)
    if groups > 1:
        norms = norms - norms.mean(-1, keepdim=True)
    deviation = norms.std(-1, keepdim=True) if norms.shape[-1] > 1 else torch.zeros_like(norms)
    flat = deviation <= _SMALLEST_DEVIATION
    return (norms.masked_fill(flat, 0.0) / deviation.masked_fill(flat, 1.0)).flatten(-2)


def choose_by_norm(
    norms: Tensor,
    *,
    routed: Tensor,
    top_k: int,
    balance: BalanceForm,
    bias: Tensor | None = None,
    mean: Callable[[Tensor], Tensor] = token_mean,
    groups: int = 1,
) -> Routing:
    """``query_norm_routing`` from the norms [..., N] of all heads, for training: does not check that they are finite.

    ``routed`` [E] int64 are the heads that are not shared, on the device of ``norms``: moving them there would wait for
    it. ``bias`` [E] is added to the scores (``norm_scores``) for the selection of heads only.
    """
    _check_top_k(top_k, len(routed), groups)
    routed_norms = norms.index_select(-1, routed)
    scores = norm_scores(routed_norms, groups)
    probability = in_groups(scores, groups).softmax(-1).flatten(-2)
    # Without a bias the norms themselves are ranked: dividing them could round two of them to the same score.
    chosen = choose(routed_norms if bias is None else scores + bias, top_k, groups)
    # The gate is exactly 0 or 1 forward, and its gradient that of the score (straight-through, eq. 9-10).
    quantised = chosen.to(probability.dtype) + (probability - probability.detach())
    gates = torch.ones_like(norms).index_copy(-1, routed, quantised)
    active = torch.ones_like(norms, dtype=torch.bool).index_copy(-1, routed, chosen)
    return Routing(gates, active, balance_loss(mean(probability), mean(chosen.to(probability.dtype)), balance, groups))


def query_norm_routing(
    q: Tensor,
    *,
    shared_heads: int | Sequence[int] | Tensor,
    top_k: int,
    balance: BalanceForm = "scaled",
    routing_groups: int = 1,
) -> Routing:
    """Routing by the norm of each head's query, for continue-tuning (paper, section 3.3 and eq. 9-10).

    ``q`` [..., N, H] is the raw query projection, before RoPE. The top-k routed heads by norm have gate 1, the other
    routed heads 0, shared heads 1. The score of a gate is the softmax over the routed heads of norm / unbiased standard
    deviation (uniform where that is zero; the official code gives NaN). It is the P of the balance loss and carries the
    straight-through gradient. With the outputs of all heads every gate gets this gradient; with those of the active
    heads (zero elsewhere, as ``sparse_attention`` returns them) a skipped head's gate gets none.

    With ``routing_groups`` G > 1, heads, ranks, deviation and softmax are those of each group; ``shared_heads`` as a
    count n are the first n / G heads of each group, as a list as many in each. ``top_k`` counts all groups' heads.

    Raises:
        ValueError: top_k or shared_heads is out of range, the heads do not divide evenly over the groups, or queries
            are not finite.
    """
    _check_form("balance", balance, get_args(BalanceForm))
    if q.dim() < 2 or not q.is_floating_point():
        raise ValueError(f"q must be floating-point numbers [..., N, H]. Got {q.dtype} {list(q.shape)}.")
    _check_finite("q", q)
    heads = _routed_in_groups(q.shape[-2], shared_heads, routing_groups)
    routed = torch.tensor(heads, dtype=torch.int64, device=q.device)
    return choose_by_norm(query_norms(q), routed=routed, top_k=top_k, balance=balance, groups=routing_groups)


def _routed_in_groups(heads: int, shared_heads: int | Sequence[int] | Tensor, groups: int) -> list[int]:
    """The heads that are not shared; ``shared_heads`` as a count are the first heads of each group."""
    routed = routed_heads(heads, shared_heads)
    _check_groups(groups, heads=heads, **{"shared heads": heads - len(routed)})
    width = heads // groups
    if isinstance(shared_heads, int):
        return [head for head in range(heads) if head % width >= shared_heads // groups]
    if len({sum(head // width == group for head in routed) for group in range(groups)}) > 1:
        shared = sorted(set(range(heads)) - set(routed))
        raise ValueError(f"shared_heads must be as many in each of the {groups} routing groups. Got {shared}.")
    return routed
