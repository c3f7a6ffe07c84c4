"""The routing functions against loops over tokens from the paper's formulas, and their edge cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.routing import D, queries, tokens, weights
from torch.testing import assert_close

from moh_megatron.moh.routing import (
    choose_by_norm,
    learned_routing,
    query_norm_routing,
    routed_heads,
    router_logits,
    top_k_mask,
    weigh_heads,
)


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponents = [math.exp(value - largest) for value in values]
    return [exponent / sum(exponents) for exponent in exponents]


def product(weight, token) -> list[float]:
    return [math.fsum(float(w) * float(x) for w, x in zip(row, token, strict=True)) for row in weight]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda head: (-scores[head], head))[:count]


def loop_balance(probabilities, choices, form) -> float:
    """Eq. 7 over all tokens, and the official code's factor."""
    routed, tokens = len(probabilities[0]), len(probabilities)
    total = 0.0
    for head in range(routed):
        mean_probability = sum(probability[head] for probability in probabilities) / tokens
        fraction = sum(head in chosen for chosen in choices) / tokens
        total += mean_probability * fraction
    return routed * total if form == "scaled" else total


def loop_learned(x, w_shared, w_routed, w_alpha, top_k, gating, form):
    """Gates, active heads and balance loss of eq. 5-7, one token and one head at a time."""
    official = gating == "normalized"
    gates, active, probabilities, choices = [], [], [], []
    for token in x.reshape(-1, x.shape[-1]).tolist():
        logits = product(w_routed.tolist(), token)
        probability, chosen = softmax(logits), best(logits, top_k)
        total = sum(probability[head] for head in chosen)
        routed_gates = [0.0] * len(logits)
        for head in chosen:
            routed_gates[head] = top_k * probability[head] / total if official else probability[head]
        row, mask = routed_gates, [head in chosen for head in range(len(logits))]
        if w_alpha is not None:
            shared_gates = [1.0]
            if w_shared is not None:
                scale = len(w_shared) if official else 1
                shared_gates = [scale * gate for gate in softmax(product(w_shared.tolist(), token))]
            a1, a2 = (2 * a if official else a for a in softmax(product(w_alpha.tolist(), token)))
            row = [a1 * gate for gate in shared_gates] + [a2 * gate for gate in routed_gates]
            mask = [True] * len(shared_gates) + mask
        gates.append(row)
        active.append(mask)
        probabilities.append(probability)
        choices.append(chosen)
    shape = (*x.shape[:-1], -1)
    balance = loop_balance(probabilities, choices, form)
    return torch.tensor(gates).reshape(shape), torch.tensor(active).reshape(shape), torch.tensor(balance)


def loop_norm(q, shared, top_k, form):
    """Routing by query norm: scores, gates and balance loss, one token at a time."""
    routed = [head for head in range(q.shape[-2]) if head not in shared]
    gates, probabilities, choices = [], [], []
    for token in q.reshape(-1, *q.shape[-2:]).tolist():
        norms = [math.sqrt(math.fsum(value * value for value in token[head])) for head in routed]
        mean = sum(norms) / len(norms)
        deviation = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / max(1, len(norms) - 1))
        probability = softmax([norm / deviation if deviation else 0.0 for norm in norms])
        chosen = best(norms, top_k)
        row = [1.0] * q.shape[-2]
        for position, head in enumerate(routed):
            row[head] = float(position in chosen)
        gates.append(row)
        probabilities.append(probability)
        choices.append(chosen)
    gates = torch.tensor(gates).reshape(q.shape[:-1])
    scores = torch.tensor(probabilities).reshape(*q.shape[:-2], len(routed))
    return gates, scores, torch.tensor(loop_balance(probabilities, choices, form))


# --- the learned router --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["scaled", "paper"])
@pytest.mark.parametrize("gating", ["normalized", "paper"])
@pytest.mark.parametrize(
    ("shared", "routed", "top_k"), [(0, 6, 3), (1, 5, 2), (2, 6, 4), (5, 3, 1), (2, 4, 4), (3, 1, 1)]
)
def test_learned_routing_equals_a_loop_over_tokens(shared, routed, top_k, gating, balance):
    x, parts = tokens(5, 3), weights(shared, routed)
    routing = learned_routing(x, *parts, top_k=top_k, gating=gating, balance=balance)
    gates, active, loss = loop_learned(x, *parts, top_k, gating, balance)
    assert routing.gates.shape == (5, 3, shared + routed)
    assert routing.gates.dtype == torch.float32
    assert torch.equal(routing.active, active)
    assert torch.equal(routing.gates > 0, active)
    assert_close(routing.gates, gates, rtol=2e-5, atol=1e-6)
    assert_close(routing.balance_loss, loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_learned_routing_accepts_any_leading_shape(shape):
    parts = weights(2, 6)
    routing = learned_routing(tokens(*shape), *parts, top_k=2)
    gates, active, loss = loop_learned(tokens(*shape), *parts, 2, "normalized", "scaled")
    assert routing.gates.shape == (*shape, 8)
    assert torch.equal(routing.active, active)
    assert_close(routing.gates, gates, rtol=2e-5, atol=1e-6)
    assert_close(routing.balance_loss, loss, rtol=1e-5, atol=1e-6)


def test_uniform_logits_give_normalized_gates_of_one():
    parts = [torch.zeros(rows, D) for rows in (2, 6, 2)]
    routing = learned_routing(tokens(4), *parts, top_k=3)
    assert routing.gates.tolist() == [[1.0] * 5 + [0.0] * 3] * 4
    assert routing.balance_loss == 3.0


def test_uniform_logits_give_paper_gates_that_sum_to_their_share():
    parts = [torch.zeros(rows, D) for rows in (2, 6, 2)]
    routing = learned_routing(tokens(4), *parts, top_k=3, gating="paper", balance="paper")
    expected = torch.tensor([1 / 4] * 2 + [1 / 12] * 3 + [0.0] * 3).expand(4, 8)
    assert_close(routing.gates, expected)
    assert_close(routing.balance_loss, torch.tensor(0.5))


def test_normalized_gates_with_even_alpha_sum_to_the_active_heads():
    w_shared, w_routed, _ = weights(3, 5)
    routing = learned_routing(tokens(9), w_shared, w_routed, torch.zeros(2, D), top_k=2)
    assert_close(routing.gates.sum(-1), torch.full((9,), 5.0))


def test_one_shared_head_is_weighted_by_alpha_alone():
    _, w_routed, w_alpha = weights(1, 5)
    assert w_alpha is not None
    x = tokens(6)
    alpha = (x @ w_alpha.T).softmax(-1)
    official = learned_routing(x, None, w_routed, w_alpha, top_k=2, gating="normalized")
    assert_close(official.gates[:, 0], 2 * alpha[:, 0])
    paper = learned_routing(x, None, w_routed, w_alpha, top_k=2, gating="paper")
    assert_close(paper.gates[:, 0], alpha[:, 0])


def test_learned_routing_without_routed_heads_uses_the_shared_ones():
    w_shared = weights(4, 1)[0]
    assert w_shared is not None
    x = tokens(5)
    routing = learned_routing(x, w_shared, None, None, top_k=0)
    assert_close(routing.gates, 4 * (x @ w_shared.T).softmax(-1))
    assert routing.active.all()
    assert routing.balance_loss == 0


@pytest.mark.parametrize("gating", ["normalized", "paper"])
def test_learned_routing_gradients_reach_every_weight(gating):
    x, parts = tokens(5).requires_grad_(), weights(2, 6)
    routing = learned_routing(x, *parts, top_k=3, gating=gating)
    (routing.gates.square().sum() + routing.balance_loss).backward()
    for tensor in (x, *parts):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 0


def test_normalized_gates_have_the_gradient_of_a_softmax_over_chosen_heads():
    x, (_, w_routed, _) = tokens(4), weights(0, 6)
    gates = learned_routing(x, None, w_routed, None, top_k=3).gates
    probe = torch.randn(gates.shape, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad((gates * probe).sum(), w_routed)
    logits = x @ w_routed.T
    chosen = logits.topk(3).indices
    expected_gates = torch.zeros(4, 6).scatter(-1, chosen, 3 * logits.gather(-1, chosen).softmax(-1))
    (expected,) = torch.autograd.grad((expected_gates * probe).sum(), w_routed)
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_learned_routing_of_bf16_computes_in_fp32():
    x, parts = tokens(6, 2).bfloat16(), [part.detach().bfloat16() for part in weights(2, 6) if part is not None]
    narrow = learned_routing(x, *parts, top_k=3)
    wide = learned_routing(x.float(), *(part.float() for part in parts), top_k=3)
    assert narrow.gates.dtype == narrow.balance_loss.dtype == torch.float32
    for got, expected in zip(narrow, wide, strict=True):
        assert torch.equal(got, expected)


def test_weigh_heads_uses_the_given_mean():
    x, parts = tokens(5), weights(0, 4)
    seen = []

    def mean(values):
        seen.append(values.shape)
        return torch.full((4,), 0.5) if len(seen) == 1 else torch.full((4,), 0.25)

    routing = weigh_heads(router_logits(x, *parts), top_k=2, gating="normalized", balance="scaled", mean=mean)
    assert routing.balance_loss == 4 * 4 * 0.5 * 0.25
    assert seen == [(5, 4), (5, 4)]


@pytest.mark.parametrize("top_k", [0, -1, 7])
def test_top_k_out_of_range_is_refused(top_k):
    message = rf"^top_k must be from 1 to the number of routed heads \(6\)\. Got {top_k}\.$"
    with pytest.raises(ValueError, match=message):
        learned_routing(tokens(2), *weights(2, 6), top_k=top_k)
    with pytest.raises(ValueError, match=message):
        query_norm_routing(torch.ones(2, 8, 4), shared_heads=2, top_k=top_k)


def test_missing_router_weights_are_refused():
    w_shared, w_routed, _ = weights(2, 6)
    with pytest.raises(ValueError, match=r"^w_alpha must be given where w_shared and w_routed are\. Got None\.$"):
        learned_routing(tokens(2), w_shared, w_routed, None, top_k=2)
    with pytest.raises(ValueError, match="w_shared and w_routed cannot both be None"):
        learned_routing(tokens(2), None, None, None, top_k=2)


# --- ties ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_top_k_mask_breaks_ties_by_index(scores, data):
    top_k = data.draw(st.integers(1, len(scores)))
    expected = [head in best(scores, top_k) for head in range(len(scores))]
    assert top_k_mask(torch.tensor(scores, dtype=torch.float32), top_k).tolist() == expected


def test_both_routings_break_ties_by_index():
    routing = learned_routing(tokens(3), None, torch.zeros(8, D), None, top_k=3)
    assert routing.active.tolist() == [[True] * 3 + [False] * 5] * 3
    routing = query_norm_routing(torch.ones(3, 8, 4), shared_heads=2, top_k=3)
    assert routing.active.tolist() == [[True] * 5 + [False] * 3] * 3


# --- the query-norm router -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", ["scaled", "paper"])
@pytest.mark.parametrize(("shared", "top_k"), [(4, 2), (0, 3), (1, 7), (7, 1), ([1, 5], 2), ([7, 0, 3], 5)])
def test_query_norm_routing_equals_a_loop_over_tokens(shared, top_k, balance):
    q = queries(5, 3, 8, 4)
    routing = query_norm_routing(q, shared_heads=shared, top_k=top_k, balance=balance)
    heads = list(range(shared)) if isinstance(shared, int) else shared
    gates, _, loss = loop_norm(q, heads, top_k, balance)
    assert torch.equal(routing.gates, gates)
    assert torch.equal(routing.active, gates.bool())
    assert_close(routing.balance_loss, loss, rtol=1e-5, atol=1e-6)


def test_choose_by_norm_equals_query_norm_routing():
    q = queries(6, 8, 4)
    by_norms = choose_by_norm(q.norm(dim=-1), routed=torch.arange(2, 8), top_k=3, balance="scaled")
    for got, expected in zip(by_norms, query_norm_routing(q, shared_heads=2, top_k=3), strict=True):
        assert_close(got, expected)


def test_routed_heads_are_those_not_shared():
    assert routed_heads(6, 2) == [2, 3, 4, 5]
    assert routed_heads(6, [5, 0]) == [1, 2, 3, 4]
    assert routed_heads(3, 3) == []


@pytest.mark.parametrize("shared", [9, -1, [8], [-1], [1, 1]])
def test_impossible_shared_heads_are_refused(shared):
    with pytest.raises(
        ValueError, match=r"^shared_heads must be (distinct heads below 8|from 0 to the number of heads \(8\))\. Got "
    ):
        query_norm_routing(queries(2, 8, 4), shared_heads=shared, top_k=1)


def score_gradient(q, probe, shared):
    """The gradient of sum(probe * score) by autograd, with the official softmax as score of the routed heads."""
    leaf = q.clone().requires_grad_()
    norms = leaf[..., shared:, :].norm(dim=-1)
    score = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    (gradient,) = torch.autograd.grad((score * probe[..., shared:]).sum(), leaf)
    return gradient


@pytest.mark.parametrize("only_chosen", [True, False])
def test_gates_pass_their_gradient_to_the_scores(only_chosen):
    q = queries(5, 2, 8, 4).requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    probe = queries(5, 2, 8, seed=4)
    if only_chosen:  # the gradient from a backend that computes only active heads
        probe = probe * routing.active
    (got,) = torch.autograd.grad((routing.gates * probe).sum(), q)
    assert_close(got, score_gradient(q.detach(), probe, 2), rtol=1e-4, atol=1e-6)
    assert got[..., :2, :].abs().max() == 0
    assert got.abs().max() > 1e-3


def test_balance_loss_passes_its_gradient_to_the_scores():
    q = queries(6, 8, 4).requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    (got,) = torch.autograd.grad(routing.balance_loss, q)
    count, heads, load = 6, 6, routing.active.float().mean(0)
    probe = (heads * load / count).expand(count, 8)
    assert_close(got, score_gradient(q.detach(), probe, 2), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("flat", [torch.zeros(2, 8, 4), torch.ones(2, 8, 4)])
def test_equal_queries_give_uniform_scores_without_nan(flat):
    q = flat.clone().requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    assert routing.gates.tolist() == [[1.0] * 5 + [0.0] * 3] * 2
    # P is uniform: 6 heads, sum P f = 3 / 6.
    assert_close(routing.balance_loss, torch.tensor(3.0))
    ((routing.gates * torch.arange(8.0)).sum() + routing.balance_loss).backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_zero_query_among_others_gives_no_nan():
    q = queries(3, 8, 4)
    q[0, 5] = 0
    q[1, :] = 0
    q.requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    ((routing.gates * torch.arange(8.0)).sum() + routing.balance_loss).backward()
    assert routing.gates.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert q.grad[2].abs().max() > 0


def test_single_routed_head_is_always_chosen():
    q = queries(4, 3, 4).requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=1)
    assert routing.gates.tolist() == [[1.0] * 3] * 4
    assert routing.balance_loss == 1.0
    routing.gates.sum().backward()
    assert q.grad is not None
    assert q.grad.abs().max() == 0


def test_query_norm_routing_of_bf16_computes_in_fp32():
    q = queries(6, 2, 8, 4).bfloat16()
    narrow = query_norm_routing(q, shared_heads=2, top_k=3)
    wide = query_norm_routing(q.float(), shared_heads=2, top_k=3)
    assert narrow.gates.dtype == torch.float32
    for got, expected in zip(narrow, wide, strict=True):
        assert torch.equal(got, expected)
    # 1 + 2^-8 is 1 in bf16, so only fp32 tells which query is longer.
    close = torch.tensor([[1.0, 0.0], [1.0, 2**-4]], dtype=torch.bfloat16)
    assert query_norm_routing(close, shared_heads=0, top_k=1).active.tolist() == [False, True]
