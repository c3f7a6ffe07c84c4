"""Inputs that the routing functions refuse, and the precision they keep."""

import math

import pytest
import torch
from support.routing import D, queries, tokens, weights

from moh_megatron.moh.routing import learned_routing, query_norm_routing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_routing_refuses_scores_that_are_not_finite(value):
    x, parts = tokens(3), weights(2, 6)
    x[1, 0] = value
    with pytest.raises(
        ValueError, match=r"^x and the weights must give finite scores\. Got \d+ of \d+ values that are inf or N"
    ):
        learned_routing(x, *parts, top_k=2)
    q = queries(3, 8, 4)
    q[2, 5, 1] = value
    with pytest.raises(ValueError, match=r"^q must give finite scores\. Got 1 of 96 values that are inf or NaN\."):
        query_norm_routing(q, shared_heads=2, top_k=2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, D + 1), (6, D), (2, D)), r"w_shared must have shape \[rows, 12\], as x has\. Got \[2, 13\]\."),
        (((2, D), (D,), (2, D)), r"w_routed must have shape \[rows, 12\], as x has\. Got \[12\]\."),
        (((2, D), (6, D), (3, D)), r"w_alpha must have 2 rows, shared and routed\. Got 3\."),
    ],
)
def test_routing_refuses_weights_of_other_shapes(shapes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        learned_routing(tokens(3), *(torch.zeros(shape) for shape in shapes), top_k=2)


def test_routing_keeps_float64():
    x, parts = tokens(5).double(), [None if part is None else part.double() for part in weights(2, 6)]
    assert learned_routing(x, *parts, top_k=2).gates.dtype == torch.float64
    assert query_norm_routing(queries(3, 8, 4).double(), shared_heads=2, top_k=2).gates.dtype == torch.float64


def test_query_norm_routing_of_extreme_queries_is_finite():
    for size in (1e20, 1e-22, 0.0):
        q = (size * queries(5, 8, 4)).requires_grad_()
        routing = query_norm_routing(q, shared_heads=2, top_k=3)
        (routing.gates * torch.randn(5, 8)).sum().backward()
        assert q.grad is not None
        for values in (routing.gates, routing.balance_loss, q.grad):
            assert values.isfinite().all(), size


def test_balance_loss_without_tokens_is_zero():
    assert query_norm_routing(torch.zeros(0, 8, 4), shared_heads=2, top_k=3).balance_loss == 0
    assert learned_routing(torch.zeros(0, D), *weights(2, 6), top_k=2).balance_loss == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating": "normalised"}, "^gating must be one of normalized, paper. Got 'normalised'"),
        ({"balance": "scalled"}, "^balance must be one of scaled, paper. Got 'scalled'"),
        ({"top_k": 2.0}, r"^top_k must be from 1 to the number of routed heads \(6\). Got 2.0"),
        ({"x": torch.tensor(1.0)}, r"^x must be floating-point numbers \[..., D\]"),
    ],
)
def test_routing_refuses_unknown_arguments(change, message):
    w_shared, w_routed, w_alpha = weights(2, 6)
    arguments = {"x": tokens(3), "w_shared": w_shared, "w_routed": w_routed, "w_alpha": w_alpha, "top_k": 2, **change}
    with pytest.raises(ValueError, match=message):
        learned_routing(**arguments)
    if "balance" in change:
        with pytest.raises(ValueError, match=message):
            query_norm_routing(queries(3, 8, 4), shared_heads=2, top_k=2, **change)


def test_query_norm_routing_accepts_shared_heads_as_tensor():
    q = queries(5, 8, 4)
    listed, tensor = (query_norm_routing(q, shared_heads=heads, top_k=2) for heads in ([1, 4], torch.tensor([1, 4])))
    assert torch.equal(listed.active, tensor.active)
    with pytest.raises(ValueError, match=r"^shared_heads must be distinct heads below 8\."):
        query_norm_routing(q, shared_heads=torch.tensor([1, 1]), top_k=2)
    with pytest.raises(ValueError, match=r"^q must be floating-point numbers \[..., N, H\]"):
        query_norm_routing(q[0, 0], shared_heads=0, top_k=1)
