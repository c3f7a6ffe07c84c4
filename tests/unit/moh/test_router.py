"""The router modules on one rank: placement, biases, schedule, auxiliary losses, frozen weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.backends.dense import causal_attention
from moh_megatron.moh.backends.slots import Slots
from moh_megatron.moh.router import LearnedRouter, QueryNormRouter, Router
from moh_megatron.moh.routing import learned_routing, query_norm_routing
from moh_megatron.moh.sparse import sparse_attention
from moh_megatron.parallel import groups

D, HEADS, SIZE = 16, 8, 4


pytestmark = pytest.mark.usefixtures("one_rank")


def make(heads: LayerHeads, *, loss_scale: float = 0.5, **settings: Any) -> Any:
    torch.manual_seed(3)
    moh = MoHConfig(shared_heads=len(heads.shared), active_heads=heads.active, **settings)
    if moh.router == "query_norm":
        layout = HeadLayout(HEADS, 4)
        return QueryNormRouter(moh, heads, loss_scale, layout=layout, group=groups.tp_group())
    return LearnedRouter(
        moh, heads, loss_scale, hidden_size=D, init_std=0.5, dtype=torch.float32, group=groups.tp_group(),
        sequence_parallel=False,
    )  # fmt: skip


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(6, 2, D, generator=generator), torch.randn(6, 2, HEADS, SIZE, generator=generator)


FIRST = LayerHeads(HEADS, (0, 1), 5)
SPREAD = LayerHeads(HEADS, (1, 4, 6), 5)


def test_learned_router_returns_heads_in_logical_order() -> None:
    router, (x, q) = make(SPREAD), inputs()
    routing = router(x, q)
    pure = learned_routing(x, router.w_shared, router.w_routed, router.w_alpha, top_k=2)
    assert torch.equal(routing.gates[..., list(SPREAD.order)], pure.gates)
    assert torch.equal(routing.active[..., list(SPREAD.order)], pure.active)
    assert routing.active[..., [1, 4, 6]].all()
    assert (routing.active.sum(-1) == 5).all()


def test_query_norm_router_accepts_a_list_of_shared_heads() -> None:
    router, (x, q) = make(SPREAD, router="query_norm"), inputs()
    order = HeadLayout(HEADS, 4).head_order  # physical position -> logical head
    physical = q[..., list(order), :]
    routing, pure = router(x, physical), query_norm_routing(q, shared_heads=[1, 4, 6], top_k=2)
    assert torch.equal(routing.gates, pure.gates)
    assert torch.equal(routing.active, pure.active)


@pytest.mark.parametrize("kind", ["learned", "query_norm"])
def test_bias_changes_the_selection_only(kind: str) -> None:
    router, (x, q) = make(FIRST, router=kind, balancing="bias", bias_update_rate=0.5), inputs()
    before = router(x, q)
    assert torch.equal(before.active, make(FIRST, router=kind)(x, q).active)
    router.bias_steps.copy_(torch.tensor([0, 0, 0, 40, 0, -40]))
    after = router(x, q)
    assert after.active[..., 5].all()
    assert not after.active[..., 7].any()
    assert (after.active.sum(-1) == 5).all()
    same = (before.active == after.active).all(-1)
    assert torch.equal(before.gates[same], after.gates[same])
    if kind == "learned":
        # The gates depend on the logits alone: 2 alpha_2 k softmax over the chosen ones.
        logits = F.linear(x, router.w_routed)
        alpha = F.linear(x, router.w_alpha).softmax(-1)[..., 1:]
        chosen = logits.masked_fill(~after.active[..., 2:], -torch.inf).softmax(-1)
        assert_close(after.gates[..., 2:], 2 * alpha * 3 * chosen)


def test_biases_move_against_the_load() -> None:
    router = make(FIRST, balancing="bias", bias_update_rate=0.25)
    router.update_bias(torch.tensor([9.0, 9, 1, 2, 3, 3, 4, 5]))  # the two shared heads first; the mean is 3
    assert router.bias_steps.tolist() == [1, 1, 0, 0, -1, -1]
    router.update_bias(torch.tensor([9.0, 9, 0, 0, 0, 0, 0, 6]))
    assert router.bias.tolist() == [0.5, 0.5, 0.25, 0.25, 0.0, -0.5]


def test_biases_balance_a_skewed_router() -> None:
    router, (x, q) = make(FIRST, balancing="bias", bias_update_rate=0.05), inputs()
    x = torch.randn(400, 1, D, generator=torch.Generator().manual_seed(5)) + 1.0
    loads = []
    for _ in range(200):
        counts = router(x, q).active.flatten(0, 1).sum(0).double()
        loads.append(counts[2:])
        router.update_bias(counts)
    skewed, balanced = (float(load.max() / load.mean()) for load in (loads[0], loads[-1]))
    assert skewed > 1.3
    assert balanced < 1.1


def test_biases_survive_a_cast_to_bf16() -> None:
    router = make(FIRST, balancing="bias")
    router.bias_steps.copy_(torch.arange(1001, 1007))
    router.bfloat16()
    assert router.bias_steps.tolist() == list(range(1001, 1007))
    assert "bias_steps" in router.state_dict()
    assert_close(router.bias, torch.arange(1001, 1007) * 0.001)


def test_router_without_biases_saves_none() -> None:
    router = make(FIRST)
    assert router.bias is None
    assert "bias_steps" not in router.state_dict()
    router.update_bias(torch.ones(HEADS))
    assert make(LayerHeads(HEADS, tuple(range(8)), 8), balancing="bias").bias is None


def test_activation_schedule_sets_the_number_of_heads() -> None:
    router, (x, q) = make(FIRST, activation_schedule_steps=6), inputs()
    used = []
    for step in range(9):
        router.follow_schedule(step)
        used.append(int(router(x, q).active[0, 0].sum()))
    assert used == [8, 8, 7, 7, 6, 6, 5, 5, 5]


def _attached(router: Router, x: Tensor, q: Tensor) -> dict[str, Tensor]:
    router.zero_grad()
    (router(x, q).gates * 0.0).sum().backward()
    return {name: p.grad.clone() for name, p in router.named_parameters() if p.grad is not None}


def test_z_loss_gradient_equals_autograd() -> None:
    router, (x, q) = make(FIRST, z_loss_coefficient=0.2, balance_coefficient=0.0), inputs()
    got = _attached(router, x, q)["w_routed"]
    weight = router.w_routed.detach().clone().requires_grad_()
    z = torch.log(torch.exp(F.linear(x, weight)).sum(-1)).square().mean()
    (expected,) = torch.autograd.grad(0.5 * 0.2 * z, weight)
    assert_close(got, expected)
    assert not _attached(make(FIRST, balance_coefficient=0.0), x, q)["w_routed"].any()


def test_balancing_by_bias_attaches_no_balance_loss() -> None:
    x, q = inputs()
    assert _attached(make(FIRST), x, q)["w_routed"].any()
    assert not _attached(make(FIRST, balancing="bias"), x, q)["w_routed"].any()


def test_frozen_router_passes_gradients_to_its_input_only() -> None:
    router, (x, q) = make(FIRST, freeze_router=True), inputs()
    x.requires_grad_()
    router(x, q).gates.square().sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in router.parameters())
    assert x.grad is not None
    assert x.grad.any()


def _straight_through(q: Tensor, k: Tensor, v: Tensor, probe: Tensor) -> Tensor:
    """The gradient of q by autograd: every gate is 0 or 1 forward and the score backward (eq. 9-10)."""
    norms = q.norm(dim=-1)[..., 2:]
    score = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    chosen = torch.zeros_like(score).scatter(-1, norms.topk(3, -1).indices, 1.0)
    gates = torch.cat([torch.ones_like(norms[..., :2]), (chosen - score).detach() + score], -1)
    out = causal_attention(q, k, v) * gates.unsqueeze(-1)
    return torch.autograd.grad((out * probe).sum(), q)[0]


def test_straight_through_gradient_of_all_heads_equals_autograd() -> None:
    torch.manual_seed(6)
    q, k, v, probe = (torch.randn(7, 2, HEADS, SIZE, dtype=torch.float64) for _ in range(4))
    q.requires_grad_()
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    full = causal_attention(q, k, v) * routing.gates.unsqueeze(-1)
    expected = _straight_through(q, k, v, probe)
    assert_close(torch.autograd.grad((full * probe).sum(), q)[0], expected)
    # With the chosen heads alone, the output is the same and the gradient differs.
    routing = query_norm_routing(q, shared_heads=2, top_k=3)
    sparse = sparse_attention(q, k, v, routing.active, backend="gathered") * routing.gates.unsqueeze(-1)
    assert_close(sparse, full)
    assert not torch.allclose(torch.autograd.grad((sparse * probe).sum(), q)[0], expected)


GROUPED = LayerHeads(HEADS, (1, 6), 6, groups=2)
"""One shared head and two of three routed ones in each of two groups of four."""


def test_learned_router_chooses_in_each_group() -> None:
    router, (x, q) = make(GROUPED), inputs()
    routing = router(x, q)
    pure = learned_routing(x, router.w_shared, router.w_routed, router.w_alpha, top_k=4, routing_groups=2)
    first_shared = [1, 0, 2, 3, 6, 4, 5, 7]  # the pure function's shared heads are the first of each group
    assert torch.equal(routing.gates[..., first_shared], pure.gates)
    assert torch.equal(routing.active[..., first_shared], pure.active)
    assert torch.equal(routing.balance_loss, pure.balance_loss)


def test_query_norm_router_chooses_in_each_group() -> None:
    router, (x, q) = make(GROUPED, router="query_norm"), inputs()
    order = HeadLayout(HEADS, 4).head_order
    routing = router(x, q[..., list(order), :])
    pure = query_norm_routing(q, shared_heads=[1, 6], top_k=4, routing_groups=2)
    assert all(torch.equal(a, b) for a, b in zip(routing, pure, strict=True))


def test_biases_move_towards_the_mean_of_their_group() -> None:
    router = make(GROUPED, balancing="bias")
    # The first group's routed heads 0, 2, 3 have a mean of 4, the second's 4, 5, 7 of 6.
    router.update_bias(torch.tensor([3.0, 99, 4, 5, 5, 6, 99, 7]))
    assert router.bias_steps.tolist() == [1, 0, -1, 1, 0, -1]


@pytest.mark.parametrize("kind", ["learned", "query_norm"])
def test_bias_of_a_group_changes_the_selection_in_this_group_only(kind: str) -> None:
    router, (x, q) = make(GROUPED, router=kind, balancing="bias", bias_update_rate=0.5), inputs()
    before = router(x, q).active
    router.bias_steps.copy_(torch.tensor([0, 0, 0, 40, 0, -40]))
    after = router(x, q).active
    assert torch.equal(before[..., :4], after[..., :4])
    assert after[..., 4].all()
    assert not after[..., 7].any()


def test_activation_schedule_of_groups_keeps_them_even() -> None:
    router, (x, q) = make(LayerHeads(HEADS, (0, 4), 4, groups=2), activation_schedule_steps=6), inputs()
    counts = []
    for step in (0, 3, 6):
        router.follow_schedule(step)
        active = router(x, q).active.unflatten(-1, (2, 4)).sum(-1)
        assert len(active.unique()) == 1
        counts.append(int(active.max()))
    assert counts == [4, 3, 2]
    assert router.active_heads == 4


def test_z_loss_of_groups_is_their_mean() -> None:
    router, (x, q) = make(GROUPED, z_loss_coefficient=0.2, balance_coefficient=0.0), inputs()
    router(x, q).gates.sum().mul(0).backward()
    logits = F.linear(x, router.w_routed).unflatten(-1, (2, 3))
    expected = 0.5 * 0.2 * logits.logsumexp(-1).square().mean()
    assert_close(router.w_routed.grad, torch.autograd.grad(expected, router.w_routed)[0])


class NoHostValues(TorchDispatchMode):
    """Refuses what would wait for a GPU: tensors made of Python numbers there, and numbers read from tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["learned", "query_norm"])
@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_choosing_heads_and_slots_never_waits_for_the_device(kind: str, balancing: str) -> None:
    heads = LayerHeads(HEADS, (1, 4), 4, groups=2)
    router, (x, q) = make(heads, router=kind, balancing=balancing), inputs()
    q.requires_grad_()
    counts = torch.arange(HEADS)
    with NoHostValues():
        routing = router(x, q)
        slots = Slots(routing.active, 2, 2)
        slots.put(slots.take(q) * slots.take(routing.gates).unsqueeze(-1)).sum().backward()
        router.update_bias(counts)
        router.logits(x, q)
        router.selection_scores(x, q)
