"""The planner compared with measurements: what real engines hold and what tensor-parallel ranks exchange."""

from __future__ import annotations

from typing import Any

import pytest

from moh_megatron.config.schema import Config
from moh_megatron.plan.communication import communication
from moh_megatron.plan.model_states import model_states
from moh_megatron.plan.parameters import weights

pytestmark = pytest.mark.slow

WORLD = 2
TOLERANCE = 0.02
CASES = ["fp32_zero0"] + [f"{precision}_zero{stage}" for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
SPECIAL = ["persistent", "frozen", "tied"]
OFFLOAD = [f"offload_{case}" for case in CASES[1:]]
ONE = [f"{precision}_zero{stage}_one_micro_batch" for precision in ("fp32", "bf16") for stage in (1, 2)]
OFFLOAD += [f"offload_{precision}_zero1_one_micro_batch" for precision in ("fp32", "bf16")]
OFFLOAD.append("offload_bf16_zero1_small_buckets")
TRAFFIC = ["tp", "sp", "query_norm", "sp_query_norm", "recompute", "sp_recompute", "dense"]
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[Any, Any]]:
    return spawn("held_memory", WORLD)


@pytest.fixture(scope="module")
def wide_results(spawn: Any) -> list[dict[Any, Any]]:
    """TP 2 x DP 2."""
    return spawn("held_memory", 2 * WORLD)


def _busiest(results: list[dict[Any, Any]], case: str, tensor: int) -> tuple[Config, dict[str, int]]:
    held = [rank[case, tensor][1] for rank in results]
    return results[0][case, tensor][0], {kind: max(of_rank[kind] for of_rank in held) for kind in held[0]}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("case", CASES + SPECIAL + ONE)
def test_planned_bytes_match_a_real_engine(results: list[dict[Any, Any]], case: str, tensor: int) -> None:
    config, held = _busiest(results, case, tensor)
    states = model_states(config, WORLD)
    assert states.parameters == pytest.approx(held["parameters"], rel=TOLERANCE)
    assert states.gradients == pytest.approx(held["gradients"], rel=TOLERANCE)
    assert states.optimizer == pytest.approx(held["optimizer"], rel=TOLERANCE)
    assert (states.host_gradients, states.host_optimizer) == (0, 0)


@pytest.mark.parametrize("case", CASES + SPECIAL + OFFLOAD)
def test_planned_bytes_match_at_two_by_two_ranks(wide_results: list[dict[Any, Any]], case: str) -> None:
    config, held = _busiest(wide_results, case, 2)
    states = model_states(config, 2 * WORLD)
    assert states.parameters == pytest.approx(held["parameters"], rel=TOLERANCE)
    assert states.gradients + states.host_gradients == pytest.approx(held["gradients"], rel=TOLERANCE)
    assert states.optimizer + states.host_optimizer == pytest.approx(held["optimizer"], rel=TOLERANCE)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("case", OFFLOAD)
def test_planned_bytes_match_with_offload(results: list[dict[Any, Any]], case: str, tensor: int) -> None:
    config, held = _busiest(results, case, tensor)
    states = model_states(config, WORLD)
    assert states.parameters == pytest.approx(held["parameters"], rel=TOLERANCE)
    assert states.optimizer == 0
    assert states.host_optimizer == pytest.approx(held["optimizer"], rel=TOLERANCE)
    assert states.gradients + states.host_gradients == pytest.approx(held["gradients"], rel=TOLERANCE)


@pytest.mark.parametrize("tensor", [1, 2])
def test_planned_weights_are_those_of_the_model_in_its_order(results: list[dict[Any, Any]], tensor: int) -> None:
    config, named = results[0]["weights", tensor]
    assert [(weight.name, weight.size) for weight in weights(config)] == named


@pytest.mark.parametrize("case", CASES + SPECIAL)
def test_planned_data_parallel_traffic_matches(results: list[dict[Any, Any]], case: str) -> None:
    config, _, sizes = results[0][case, 1]
    planned = communication(config, WORLD)
    for operation, measured in sizes.items():
        ours = sum(exchange.sent_bytes for exchange in planned if exchange.operation == operation)
        # The norms and flags of each step are small, but not negligible beside so small a model.
        assert ours * WORLD / PASSES[operation] == pytest.approx(sum(measured), rel=TOLERANCE, abs=1000), operation


@pytest.mark.parametrize("case", TRAFFIC)
def test_planned_tensor_parallel_traffic_matches(results: list[dict[Any, Any]], case: str) -> None:
    config, sizes = results[0]["traffic", case]
    planned = [exchange for exchange in communication(config, WORLD) if exchange.group == "tensor"]
    steps = config.train.global_batch_size
    for operation, measured in sizes.items():
        ours = sum(exchange.sent_bytes for exchange in planned if exchange.operation == operation)
        assert ours * WORLD / PASSES[operation] == steps * sum(measured), (operation, measured)
