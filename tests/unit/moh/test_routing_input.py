"""What the routing functions refuse, and the precision they keep."""

import math

import pytest
import torch
from support.routing import D, queries, tokens, weights

from moh_megatron.moh.routing import learned_routing, query_norm_routing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_told(value):
    x, parts = tokens(3), weights(2, 6)
    x[1, 0] = value
    with pytest.raises(
        ValueError, match=r"^x and the weights must give finite scores\. Got \d+ of \d+ that are inf or N"
    ):
        learned_routing(x, *parts, top_k=2)
    q = queries(3, 8, 4)
    q[2, 5, 1] = value
    with pytest.raises(ValueError, match=r"^q must give finite scores\. Got 1 of 24 that are inf or NaN\."):
        query_norm_routing(q, shared_heads=2, top_k=2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, D + 1), (6, D), (2, D)), r"w_shared must have shape \[rows, 12\], as x has\. Got \[2, 13\]\."),
        (((2, D), (D,), (2, D)), r"w_routed must have shape \[rows, 12\], as x has\. Got \[12\]\."),
        (((2, D), (6, D), (3, D)), r"w_alpha must have 2 rows, shared and routed\. Got 3\."),
    ],
)
def test_weights_of_other_shapes_are_told(shapes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        learned_routing(tokens(3), *(torch.zeros(shape) for shape in shapes), top_k=2)


def test_float64_stays():
    x, parts = tokens(5).double(), [None if part is None else part.double() for part in weights(2, 6)]
    assert learned_routing(x, *parts, top_k=2).gates.dtype == torch.float64
    assert query_norm_routing(queries(3, 8, 4).double(), shared_heads=2, top_k=2).gates.dtype == torch.float64
