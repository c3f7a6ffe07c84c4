"""Compares operations per token with torch's own counter and with sums made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moh_megatron.config.schema import Config
from moh_megatron.model import core_attention
from moh_megatron.model.attention_backend import attention_backends
from moh_megatron.model.build import build_model, moh_layers, token_losses
from moh_megatron.moh import attention, sparse
from moh_megatron.moh.balancing import follow_schedule
from moh_megatron.monitor.flops import FlopsPerToken, computed_heads, flops_per_token, skips_heads

Tiny = Callable[..., Config]
HEAD = 6 * 32 * 96
ROUTER = 6 * 2 * 32 * (2 + 6 + 2)
HEAD_CORE = 2 * 4 * (16 + 1) / 2
"""One product of one head's attention."""


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("changes", [{}, {"moh.enabled": False}, {"moh.router": "query_norm"}], ids=str)
def test_operations_with_weights_equal_those_of_torch(tiny: Tiny, recompute: str, changes: dict[str, Any]) -> None:
    """torch's counter counts no operations in fused attention on a CPU, only the others."""
    config = tiny({"moh.backend": "dense", **changes, "train.recompute": recompute})
    model, tokens = build_model(config).train(), torch.randint(0, 96, (2, 17))
    with FlopCounterMode(display=False) as counter:
        token_losses(model, tokens).mean().backward()
    attention = 2 * 8 * HEAD_CORE * (9 if recompute == "full" else 7)
    assert counter.get_total_flops() == 2 * 16 * (flops_per_token(config, "dense").executed.total - attention)


def attention_of_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [S, B, N, H], k and v [S, B, G, H] -> [S, B, N, H], in matrix products over the full S x S."""
    width = q.shape[2] // k.shape[2]
    q_BNSH, k_BNSH, v_BNSH = (
        tensor.permute(1, 2, 0, 3) for tensor in (q, k.repeat_interleave(width, 2), v.repeat_interleave(width, 2))
    )
    scores = q_BNSH @ k_BNSH.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v_BNSH).permute(2, 0, 1, 3)


@pytest.mark.parametrize("changes", [{}, {"moh.enabled": False}, {"moh.router": "query_norm"}], ids=str)
def test_operations_of_attention_equal_those_of_torch(
    tiny: Tiny, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention written as products, torch counts the full S x S, and no scores that are computed again."""
    config = tiny({"moh.backend": "dense", **changes})
    model, tokens = build_model(config).train(), torch.randint(0, 96, (2, 17))
    for layer in moh_layers(model):
        monkeypatch.setattr(layer, "attend", lambda ends, q, k, v, active: attention_of_products(q, k, v))
    monkeypatch.setattr(core_attention, "causal_attention", lambda q, k, v, **unused: attention_of_products(q, k, v))
    with FlopCounterMode(display=False) as counter:
        token_losses(model, tokens).mean().backward()
    full = flops_per_token(config, "dense", causal=False)
    expected = full.dense_equivalent.total + (0 if changes else ROUTER)
    assert counter.get_total_flops() == pytest.approx(2 * 16 * expected, rel=0.01)
    # Fused attention computes the scores again.
    recomputed = 2 * 8 * 2 * 4 * 16
    assert full.executed.total == pytest.approx(expected + recomputed)
    assert full.executed.total > flops_per_token(config, "dense").executed.total


def test_executed_operations_fall_with_active_heads_only_where_heads_are_skipped(tiny: Tiny) -> None:
    def executed(backend: str) -> list[float]:
        return [totals(tiny({"moh.active_heads": active}), backend)[2] for active in (8, 6, 4, 3)]

    dense, sparse = executed("dense"), executed("cpu")
    assert len(set(dense)) == 1
    assert sparse == sorted(sparse, reverse=True)
    assert sparse[0] == dense[0]
    assert len(set(sparse)) == 4


def totals(config: Config, backend: str) -> tuple[float, float, float]:
    """Operations per token: dense-equivalent, active heads, executed."""
    flops: FlopsPerToken = flops_per_token(config, backend)
    return flops.dense_equivalent.total, flops.active_heads.total, flops.executed.total


def test_masked_heads_count_as_executed(tiny: Tiny) -> None:
    config = tiny()  # 4 of 8 heads are active
    dense, active, executed = totals(config, "dense")
    twin = tiny({"moh.enabled": False})
    assert dense == flops_per_token(twin, "dense").dense_equivalent.total == totals(config, "triton")[0]
    projections = 6 * (2 * 8 + 2 * 4) * 32 * 4 + 6 * 3 * 32 * 48
    assert dense == HEAD + 2 * (projections + 6 * 8 * HEAD_CORE)
    assert active == HEAD + ROUTER + 2 * (projections - 6 * 2 * 4 * 32 * 4 + 6 * 4 * HEAD_CORE)
    assert executed == HEAD + ROUTER + 2 * (projections + 7 * 8 * HEAD_CORE)
    assert totals(config, "triton")[2] == HEAD + ROUTER + 2 * (projections + 7 * 4 * HEAD_CORE)
    assert executed > dense > active


def test_query_norm_routing_needs_all_queries(tiny: Tiny) -> None:
    queries = 2 * 6 * 4 * 32 * 4
    active = totals(tiny({"moh.router": "query_norm"}), "dense")[1]
    assert active == totals(tiny(), "dense")[1] - ROUTER + queries


def test_recomputation_counts_as_executed_only(tiny: Tiny) -> None:
    none, selective, full = (totals(tiny({"train.recompute": kind}), "dense") for kind in ("none", "selective", "full"))
    assert none[:2] == selective[:2] == full[:2]
    assert selective[2] == none[2] + 2 * 2 * 8 * HEAD_CORE
    assert full[2] > selective[2]


def test_each_layer_counts_its_own_heads(tiny: Tiny) -> None:
    few, many, mixed = (
        totals(tiny({"moh.active_heads": active, "moh.shared_heads": 2}), "cpu")[2] for active in (3, 7, [3, 7])
    )
    assert mixed == (few + many) / 2


def test_which_backends_skip_heads() -> None:
    assert [skips_heads(name) for name in ("dense", "cpu", "gathered", "slots")] == [False, True, True, True]


IN_GROUPS = {"model.num_query_groups": 2, "moh.routing_groups": "kv", "moh.shared_placement": "spread"}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("changes", [{}, {"moh.backend": "slots"}, {"moh.activation_schedule_steps": 4}], ids=str)
def test_heads_chosen_in_kv_groups_are_skipped_at_every_length(
    tiny: Tiny, documents: bool, changes: dict[str, Any]
) -> None:
    """Short documents, too, are computed by slots, on every device."""
    config = tiny({**IN_GROUPS, "data.document_mask": documents, **changes})
    backends = attention_backends(config, torch.device("cuda"))
    assert backends == [["slots"]] * 2
    assert computed_heads(config, backends) == [4, 4]
    assert computed_heads(tiny({**IN_GROUPS, "data.document_mask": True, "moh.backend": "dense"}), "dense") == [8, 8]
    rank_heads = tiny({**IN_GROUPS, "parallel.tensor": 2, "moh.active_heads": 6, "data.document_mask": documents})
    assert computed_heads(rank_heads, [["slots", "dense"], ["slots", "slots"]]) == [3 + 4, 6]


def test_computed_heads_are_the_slots_of_a_running_model(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def slots(ends: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        computed.append(q.shape[2])
        return attend_slots(ends, q, k, v)

    attend_slots = attention.attend_slots
    monkeypatch.setattr(attention, "attend_slots", slots)
    config = tiny({**IN_GROUPS, "moh.backend": "slots", "moh.active_heads": [4, 6], "moh.activation_schedule_steps": 2})
    model = build_model(config).eval()
    found = []
    for step in (0, 1, 2):
        computed.clear()
        follow_schedule(moh_layers(model), step)
        token_losses(model, torch.randint(0, 96, (1, 17)))
        found.append(list(computed))
        assert computed_heads(config, attention_backends(config, torch.device("cpu"), step), step) == computed
    assert found == [[8, 8], [6, 8], [4, 6]]


def test_operations_of_slots_equal_those_of_torch(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny({**IN_GROUPS, "moh.backend": "slots"})
    model, tokens = build_model(config).train(), torch.randint(0, 96, (2, 17))
    monkeypatch.setattr(attention, "attend_slots", lambda ends, q, k, v: attention_of_products(q, k, v))
    with FlopCounterMode(display=False) as counter:
        token_losses(model, tokens).mean().backward()
    recomputed = 2 * 4 * 2 * 4 * 16
    executed = flops_per_token(config, "slots", causal=False).executed.total
    assert counter.get_total_flops() == pytest.approx(2 * 16 * (executed - recomputed), rel=0.01)


def test_computed_heads_are_those_a_running_model_computes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with different shares of active heads use different backends, and the schedule starts with more heads."""
    computed: list[int] = []

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, active: torch.Tensor, **unused: Any) -> torch.Tensor:
        computed.append(active.numel())
        return dense(q, k, v, active, **unused)

    def skipping(kernel: Any, q: Any, k: Any, v: Any, active: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append(int(active.sum()))
        return ragged(kernel, q, k, v, active, *rest)

    dense, ragged = sparse.masked_attention, sparse.ragged_attention
    monkeypatch.setattr(sparse, "masked_attention", masked)
    monkeypatch.setattr(sparse, "ragged_attention", skipping)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    long = {"train.sequence_length": 512, "moh.active_heads": [3, 7], "moh.activation_schedule_steps": 4}
    config, device, tokens = tiny(long), torch.device("cpu"), torch.randint(0, 96, (1, 513))
    model = build_model(config).eval()
    found = []
    for step in (0, 2, 4):
        computed.clear()
        follow_schedule(moh_layers(model), step)
        token_losses(model, tokens)
        found.append([pairs / 512 for pairs in computed])
        assert computed_heads(config, attention_backends(config, device, step), step) == found[-1]
    assert found == [[8, 8], [6, 8], [3, 7]]
    assert computed_heads(config, attention_backends(config, device)) == found[-1]
    assert computed_heads(tiny({**long, "data.document_mask": True}), "cpu") == [8, 8], "short documents are masked"


def test_a_rank_that_masks_its_heads_computes_all_of_them(tiny: Tiny) -> None:
    config = tiny({"parallel.tensor": 2, "moh.shared_placement": "first"})  # 2 + 2 * 2 / 6 and 4 * 2 / 6 of 4 heads
    assert computed_heads(config, [["cpu", "cpu"], ["dense", "cpu"]]) == pytest.approx([4, 4 + 4 / 3])
