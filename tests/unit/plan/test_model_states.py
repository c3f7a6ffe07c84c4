"""Bytes of model states against counts by hand; tests/distributed/test_held_memory.py has real engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from moh_megatron.config.parameter_count import parameter_count, rank_parameters
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.plan.model_states import model_states
from moh_megatron.plan.parameters import total_size, weights

Tiny = Callable[..., Config]
N = 22_304
"""Parameters of ``tiny``, 160 of them in norms. All groups are divisible by 4, so two replicas need no padding."""


def test_weights_without_tensor_parallelism_are_all_parameters(tiny: Tiny) -> None:
    for changes in ({}, {"model.tie_word_embeddings": True}, {"moh.router": "query_norm"}, {"moh.enabled": False}):
        config = tiny(changes)
        assert total_size(weights(config)) == parameter_count(config.model, config.moh).total
    assert total_size(weights(tiny())) == N


def test_tensor_parallelism_shards_all_but_norms_and_routers(tiny: Tiny) -> None:
    router, norms = parameter_count(tiny().model, tiny().moh).router, 5 * 32
    half = tiny({"parallel.tensor": 2})
    assert total_size(weights(half)) == (N - router - norms) // 2 + router + norms == rank_parameters(half)


@pytest.mark.parametrize(
    ("precision", "stage", "parameters", "gradients", "optimizer"),
    [
        ("fp32", 0, 4 * N, 4 * N, 8 * N),
        ("fp32", 1, 4 * N, 4 * N, 6 * N),
        ("bf16", 1, 2 * N, 6 * N, 6 * N),
        ("bf16", 2, 2 * N, 2 * N, 6 * N),
        ("bf16", 3, 2 * N, 2 * N, 6 * N),  # every weight is small enough to be held in full besides its partition
    ],
)
def test_states_of_two_replicas_equal_a_count_by_hand(
    tiny: Tiny, precision: str, stage: int, parameters: int, gradients: int, optimizer: int
) -> None:
    states = model_states(tiny({"train.precision": precision, "parallel.zero_stage": stage}), 2)
    partition = N if stage == 3 else 0
    assert states.parameters == parameters + partition
    assert (states.gradients, states.optimizer) == (gradients, optimizer)


def test_stage_2_in_fp32_keeps_all_of_the_weight_on_a_partition_border(tiny: Tiny) -> None:
    config = tiny({"parallel.zero_stage": 2, "model.num_layers": 3})
    n = total_size(weights(config))
    gradients = model_states(config, 2).gradients
    assert 4 * n / 2 < gradients < 4 * n / 2 + 4 * max(weight.size for weight in weights(config))


def test_stage_3_partitions_weights_above_the_threshold(tiny: Tiny) -> None:
    config = tiny({"parallel.zero_stage": 3, "train.precision": "bf16"})
    all_partitioned = dataclasses.replace(config, deepspeed={"zero_optimization": {"param_persistence_threshold": 0}})
    assert model_states(all_partitioned, 2).parameters == N
    assert model_states(all_partitioned, 4).parameters == N / 2


def test_padding_to_the_data_parallel_size_is_counted(tiny: Tiny) -> None:
    states = model_states(tiny({"train.global_batch_size": 12, "train.precision": "bf16"}), 12)
    padded = -(-(N - 160) // 24) * 24 + -(-160 // 24) * 24
    assert padded > N
    assert states.parameters == 2 * padded
    assert states.optimizer == 12 * padded // 12


def test_frozen_routers_have_no_gradient_and_no_optimizer_state(tiny: Tiny) -> None:
    config = tiny({"moh.freeze_router": True})
    trained = N - parameter_count(config.model, config.moh).router
    states = model_states(config, 1)
    assert (states.parameters, states.gradients, states.optimizer) == (4 * N, 4 * trained, 12 * trained)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_the_optimizer_state_to_the_host(tiny: Tiny, stage: int) -> None:
    states = model_states(tiny({"parallel.zero_stage": stage, "parallel.offload_optimizer": True}), 2)
    assert (states.optimizer, states.host_optimizer) == (0, 6 * N)
    assert states.host_gradients >= 2 * N


def test_buffers_follow_the_deepspeed_section(tiny: Tiny) -> None:
    config = tiny({"parallel.zero_stage": 2})
    tuned = {"zero_optimization": {"reduce_bucket_size": 1000, "overlap_comm": False}}
    assert model_states(config, 2).buffers == 2 * 4 * N
    assert model_states(dataclasses.replace(config, deepspeed=tuned), 2).buffers == 4000


def test_world_size_that_does_not_fit_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"divisible by parallel\.tensor"):
        model_states(tiny({"parallel.tensor": 2}), 3)
    with pytest.raises(UserError, match=r"zero_optimization\.stage"):
        model_states(dataclasses.replace(tiny(), deepspeed={"zero_optimization": {"stage": 2}}), 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_every_rank_holds_the_full_teacher(tiny: Tiny, stage: int) -> None:
    changes = {"distillation.teacher": "dense", "train.precision": "bf16", "parallel.zero_stage": stage}
    dense = parameter_count(tiny().model, tiny().moh).dense
    states = model_states(tiny(changes), 2)
    assert states.teacher == 2 * dense
    assert states.device == model_states(tiny(changes | {"distillation.teacher": None}), 2).device + 2 * dense
