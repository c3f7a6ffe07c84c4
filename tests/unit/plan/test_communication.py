"""The bytes a rank sends; tests/distributed/test_held_memory.py compares them with real exchanges of two ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moh_megatron.config.schema import Config
from moh_megatron.plan.communication import communication
from moh_megatron.plan.parameters import total_size, weights

Tiny = Callable[..., Config]


def sent(config: Config, world_size: int, group: str) -> dict[str, int]:
    """The bytes of each operation."""
    found: dict[str, int] = {}
    for traffic in communication(config, world_size):
        if traffic.group == group:
            found[traffic.operation] = found.get(traffic.operation, 0) + traffic.sent_bytes
    return found


def test_one_rank_sends_nothing(tiny: Tiny) -> None:
    assert communication(tiny(), 1) == []


@pytest.mark.parametrize("replicas", [2, 4])
def test_ring_sends_all_but_one_share(tiny: Tiny, replicas: int) -> None:
    config = tiny()
    size = 4 * total_size(weights(config))
    share = (replicas - 1) / replicas
    assert sent(config, replicas, "data") == {"all-reduce": 2 * share * size, "all-gather": share * size}


def test_stage_2_reduces_gradients_after_every_micro_batch(tiny: Tiny) -> None:
    once, twice = (sent(tiny({"parallel.zero_stage": stage}), 2, "data")["all-reduce"] for stage in (1, 2))
    assert twice == 2 * once


def test_reduction_to_the_owner_sends_half(tiny: Tiny) -> None:
    config = tiny({"parallel.zero_stage": 2})
    section = {"zero_optimization": {"use_multi_rank_bucket_allreduce": False}}
    to_owner = sent(dataclasses.replace(config, deepspeed=section), 2, "data")
    assert 2 * to_owner["reduce"] == sent(config, 2, "data")["all-reduce"]


def test_stage_3_gathers_a_large_model_twice(tiny: Tiny) -> None:
    changes: dict[str, Any] = {
        "model.hidden_size": 4096,
        "model.ffn_hidden_size": 14336,
        "model.num_layers": 32,
        "parallel.zero_stage": 3,
        "train.precision": "bf16",
        "train.global_batch_size": 2,
    }
    config = tiny(changes)
    n = total_size(weights(config))
    assert sent(config, 2, "data")["all-gather"] * 2 == pytest.approx(2 * (2 * n - 5e8), rel=0.01)


def test_tensor_parallel_traffic_is_proportional_to_the_batch(tiny: Tiny) -> None:
    half = {"parallel.tensor": 2, "train.total_tokens": 640}
    one, two = (sent(tiny({**half, "train.global_batch_size": batch}), 2, "tensor") for batch in (2, 4))
    assert two == {operation: 2 * size for operation, size in one.items()}
    hidden, gates = 4 * 16 * 32, 4 * 16 * 8
    assert one == {"all-reduce": 2 * (2 * (2 * 2 + 1) * hidden + 2 * gates)}
