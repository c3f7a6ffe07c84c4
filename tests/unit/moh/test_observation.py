"""What is observed of routers whose heads compete within groups."""

from __future__ import annotations

import math

import pytest
import torch

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.observation import observe
from moh_megatron.moh.router import LearnedRouter, QueryNormRouter
from moh_megatron.parallel import groups

pytestmark = pytest.mark.usefixtures("one_rank")

GROUPED = LayerHeads(8, (0, 4), 4, groups=2)


def entropy(probabilities: list[float]) -> float:
    return -sum(share * math.log(share) for share in probabilities) / math.log(len(probabilities))


def test_entropy_and_z_loss_are_means_over_groups() -> None:
    moh = MoHConfig(shared_heads=2, active_heads=4, routing_groups="kv")
    router = LearnedRouter(
        moh,
        GROUPED,
        1.0,
        hidden_size=6,
        init_std=1.0,
        dtype=torch.float32,
        group=groups.tp_group(),
        sequence_parallel=False,
    )
    assert router.w_routed is not None
    with torch.no_grad():
        router.w_routed.copy_(torch.eye(6))
    # The logits of the routed heads: all equal in the first group, far apart in the second one.
    x = torch.tensor([1.0, 1.0, 1.0, math.log(0.7), math.log(0.2), math.log(0.1)]).expand(5, 2, 6)
    z, mean_entropy, shared, routed = observe(router, x, torch.zeros(5, 2, 8, 4)).tolist()
    assert mean_entropy == pytest.approx((1.0 + entropy([0.7, 0.2, 0.1])) / 2)
    assert z == pytest.approx(((1 + math.log(3)) ** 2 + 0.0) / 2, rel=1e-5)
    assert shared + routed == pytest.approx(2.0)


def test_query_norms_are_observed_by_the_scores_of_their_group() -> None:
    moh = MoHConfig(shared_heads=2, active_heads=4, routing_groups="kv", router="query_norm")
    router = QueryNormRouter(moh, GROUPED, 1.0, layout=HeadLayout(8, 2), group=groups.tp_group())
    norms = torch.tensor([9.0, 1.0, 1.0, 1.0, 9.0, 1.0, 2.0, 3.0])
    q = norms.view(8, 1).expand(5, 2, 8, 1)
    z, mean_entropy, *alpha = observe(router, torch.zeros(5, 2, 6), q).tolist()
    # Equal norms have score 0; 1, 2 and 3 have deviation 1.
    assert mean_entropy == pytest.approx((1.0 + entropy(torch.tensor([1.0, 2.0, 3.0]).softmax(0).tolist())) / 2)
    assert all(map(math.isnan, [z, *alpha]))
