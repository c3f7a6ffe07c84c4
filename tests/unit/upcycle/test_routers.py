"""Initial routers that leave a dense model unchanged."""

from __future__ import annotations

import pytest
import torch

from moh_megatron.io.errors import UserError
from moh_megatron.moh.routing import learned_routing
from moh_megatron.upcycle.routers import initial_routers

BIAS = {"moh.balancing": "bias"}


def weights(config, layer=0):
    prefix = f"model.layers.{layer}.self_attn.router."
    named = dict(initial_routers(config))
    return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_active_gates_are_one_and_tokens_use_different_heads(tiny, shared, precision):
    router = weights(tiny({"moh.shared_heads": shared, "moh.active_heads": 5, "train.precision": precision}))
    x = 30 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    routing = learned_routing(
        x, router.get("shared.weight"), router["routed.weight"], router.get("alpha.weight"), top_k=5 - shared
    )
    torch.testing.assert_close(routing.gates, routing.active.float(), rtol=0, atol=2e-7)
    assert routing.active[:, shared:].any(0).all()
    assert not routing.active[:, shared:].all(0).any()


@pytest.mark.parametrize("gate_softmax", ["layer", "group"])
@pytest.mark.parametrize("shared", [0, 2])
def test_active_gates_are_one_in_kv_groups(tiny, grouped, gate_softmax, shared):
    changes = {**grouped, "moh.shared_heads": shared, "moh.active_heads": 6, "moh.gate_softmax": gate_softmax}
    router = weights(tiny(changes))
    x = 30 * torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    routing = learned_routing(
        x,
        router.get("shared.weight"),
        router["routed.weight"],
        router.get("alpha.weight"),
        top_k=6 - shared,
        routing_groups=2,
        gate_softmax=gate_softmax,
    )
    torch.testing.assert_close(routing.gates, routing.active.float(), rtol=0, atol=2e-7)
    assert (routing.active.unflatten(-1, (2, 4)).sum(-1) == 3).all()
    assert len(routing.active.unique(dim=0)) > 4


def test_the_same_seed_gives_the_same_routers(tiny):
    first, again = (dict(initial_routers(tiny())) for _ in range(2))
    other = dict(initial_routers(tiny({"run.seed": 5})))
    name = "model.layers.1.self_attn.router.routed.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_dense_model_and_query_norm_router_get_no_weights(tiny):
    assert not list(initial_routers(tiny({"moh.enabled": False})))
    assert not list(initial_routers(tiny({"moh.router": "query_norm"})))
    biases = dict(initial_routers(tiny({"moh.router": "query_norm", **BIAS})))
    assert {tuple(bias.shape) for bias in biases.values()} == {(6,)}
    assert {bias.dtype for bias in biases.values()} == {torch.int64}
    assert len(biases) == 2


def test_initial_routers_refuse_gating_paper(tiny):
    with pytest.raises(UserError, match=r"moh\.gating must be normalized"):
        list(initial_routers(tiny({"moh.gating": "paper"})))
