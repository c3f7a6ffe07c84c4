"""What is observed of routers whose heads compete within groups."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.observation import RoutingObserver, observe
from moh_megatron.moh.router import LearnedRouter, QueryNormRouter
from moh_megatron.parallel import groups

pytestmark = pytest.mark.usefixtures("one_rank")

GROUPED = LayerHeads(8, (0, 4), 4, groups=2)


def entropy(probabilities: list[float]) -> float:
    return -sum(share * math.log(share) for share in probabilities) / math.log(len(probabilities))


def learned_router() -> LearnedRouter:
    return LearnedRouter(
        MoHConfig(shared_heads=2, active_heads=4, routing_groups="kv"),
        GROUPED,
        1.0,
        hidden_size=6,
        init_std=1.0,
        dtype=torch.float32,
        group=groups.tp_group(),
        sequence_parallel=False,
    )


def test_routers_are_observed_before_zero_takes_their_weights_away() -> None:
    router = learned_router()

    def release(*unused: Any) -> None:
        for weight in router.parameters():
            weight.data = torch.empty(0)

    router.register_forward_hook(release)  # as DeepSpeed's, from before there is an observer
    layer: Any = SimpleNamespace(router=router)
    observer = RoutingObserver([layer])
    observer.on = True
    x, q = torch.randn(5, 2, 6), torch.zeros(5, 2, 8, 4)
    expected = observe(router, x, q)
    router(x, q)
    drained = observer.drain()
    assert drained is not None
    assert torch.equal(drained[0], expected)


def test_entropy_and_z_loss_are_means_over_groups() -> None:
    router = learned_router()
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
