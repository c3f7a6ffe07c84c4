"""Compares the figures of a step with counts made by hand, in event files and for each layout of two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

LAYOUTS = ("tp1", "tp2", "tp2_sp")
RECOMPUTE = ("none", "selective", "full")
TOKENS = 4 * 32


@pytest.fixture(scope="module")
def results(spawn: Callable[[str, int], list[Any]]) -> list[dict[Any, Any]]:
    return spawn("telemetry", 2)


def events_of(results: list[dict[Any, Any]], case: str) -> EventAccumulator:
    """The event file of a case, as TensorBoard reads it."""
    events = EventAccumulator(str(Path(results[0]["folder"]) / case))
    events.Reload()
    return events


def counted_heads(results: list[dict[Any, Any]], layout: str, case: str) -> torch.Tensor:
    """[L, N] tokens of the whole batch that used each head: replicas see different rows, tensor-parallel ranks all."""
    counts = [torch.tensor(rank[layout, case]["by_hand"], dtype=torch.float64) for rank in results]
    if layout == "tp1":
        return counts[0] + counts[1]
    assert torch.equal(counts[0], counts[1])
    return counts[0]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_load_in_the_event_file_equals_counts_by_hand(results: Any, layout: str, recompute: str) -> None:
    counts = counted_heads(results, layout, recompute)
    assert counts.sum() == TOKENS * 5 * 2, "5 of 8 heads in two layers"
    for rank in results:
        assert torch.equal(rank[layout, recompute]["load"], counts / TOKENS)
    events = events_of(results, f"{layout}_{recompute}")
    for layer, heads in enumerate(counts.tolist()):
        for head, count in enumerate(heads):
            (event,) = events.Scalars(f"head_load/layer_{layer:02d}/head_{head:02d}")
            assert event.value == pytest.approx(count / TOKENS, rel=1e-7)


def test_every_layout_has_the_same_figures(results: Any) -> None:
    reference = results[0]["tp1", "none"]
    for layout in LAYOUTS:
        for recompute in RECOMPUTE:
            found = results[0][layout, recompute]
            assert torch.equal(found["load"], reference["load"])
            assert_close(found["observed"], reference["observed"], rtol=1e-5, atol=1e-6)
            assert_close(results[1][layout, recompute]["observed"], found["observed"], rtol=0, atol=0)
    z, entropy, shared, routed = reference["observed"].unbind(1)
    assert ((z > 0) & (entropy > 0.3) & (entropy < 1)).all()
    assert_close(shared + routed, torch.full_like(shared, 2.0))


def test_query_norm_routers_have_no_alpha_and_no_z_loss(results: Any) -> None:
    for layout in LAYOUTS:
        z, entropy, shared, routed = results[0][layout, "query_norm"]["observed"].unbind(1)
        assert torch.isnan(torch.stack([z, shared, routed])).all()
        assert_close(entropy, results[0]["tp1", "query_norm"]["observed"][:, 1], rtol=1e-5, atol=1e-6)
        assert ((entropy > 0) & (entropy < 1)).all()
        assert results[0][layout, "query_norm"]["router_norm"] is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dead_head_raises_an_alarm_in_its_interval(results: Any, layout: str) -> None:
    (message,) = results[0][layout, "dead"]["messages"]
    found = "dead heads: layer 0 head 5, layer 1 head 5 with less than 0.1 of the fair load (monitor.alarm_dead_heads)"
    assert message.startswith(f"step 1: {found}")
    assert results[1][layout, "dead"]["messages"] == [], "only the first rank reports it"
    assert results[0][layout, "dead"]["load"][:, 5].tolist() == [0.0, 0.0]
    events = events_of(results, f"{layout}_dead")
    (alarm,) = events.Tensors("alarms/text_summary")
    assert (alarm.step, alarm.tensor_proto.string_val[0].decode()[: len(found)]) == (1, found)
    assert events.Scalars("routing_dead_heads/layer_00")[0].value == pytest.approx(1 / 6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_equal_those_of_one_process(results: Any, layout: str, stage: int) -> None:
    for rank in results:
        found = rank[layout, stage]
        for name in ("router_norm", "parameter_norm"):
            assert math.isclose(found[name], results[0]["single process"][name], rel_tol=1e-5), name
