from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps, validate
from moh_megatron.io.errors import UserError

_LENGTH = "the run's 100 steps (train.total_tokens / (train.global_batch_size x train.sequence_length))"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"model.hidden_size": 36},
            [
                "model.hidden_size must be divisible by model.num_attention_heads (8) unless model.kv_channels is "
                "given. Got 36; nearest: 32 or 40."
            ],
        ),
        ({"model.hidden_size": 36, "model.kv_channels": 4}, []),
        ({"evaluate.device": "gpu"}, ["evaluate.device must be cpu, cuda (or cuda:N) or auto. Got gpu."]),
        ({"evaluate.device": "cuda:1"}, []),
        (
            {"evaluate.suite": "s.yaml"},
            ["evaluate.interval must be the steps between evaluations with evaluate.suite. Got 0, which is never."],
        ),
        (
            {"evaluate.interval": 5},
            ["evaluate.suite must name a file as in configs/eval with evaluate.interval (5). Got null."],
        ),
        (
            {"model.kv_channels": 7},
            ["model.kv_channels must be even: RoPE rotates pairs of channels. Got 7; nearest: 6 or 8."],
        ),
        (
            {"model.hidden_size": 24},
            [
                "model.hidden_size / model.num_attention_heads, the size of a head, must be even: RoPE rotates pairs "
                "of channels. Got 3; nearest hidden_size: 16 or 32."
            ],
        ),
        (
            {"model.num_query_groups": 3},
            ["model.num_query_groups must divide model.num_attention_heads (8). Got 3; nearest: 2 or 4."],
        ),
        (
            {"model.max_position_embeddings": 8},
            ["model.max_position_embeddings must be at least train.sequence_length (16). Got 8."],
        ),
        (
            {"moh.shared_heads": None, "moh.active_heads": None},
            [
                "moh.shared_heads is required unless moh.enabled is false.",
                "moh.active_heads is required unless moh.enabled is false.",
            ],
        ),
        ({"moh.shared_heads": None, "moh.active_heads": None, "moh.enabled": False}, []),
        ({"moh.shared_heads": 0}, []),
        ({"moh.active_heads": 8}, []),
        (
            {"moh.active_heads": 2},
            [
                "moh.active_heads must be greater than moh.shared_heads (2) and at most model.num_attention_heads "
                "(8). Got 2."
            ],
        ),
        (
            {"moh.active_heads": 9},
            [
                "moh.active_heads must be greater than moh.shared_heads (2) and at most model.num_attention_heads "
                "(8). Got 9."
            ],
        ),
        ({"moh.shared_heads": 9}, ["moh.shared_heads must be at most model.num_attention_heads (8). Got 9."]),
        ({"moh.shared_heads": 8, "moh.active_heads": 8}, []),
        (
            {"moh.shared_heads": 8, "moh.active_heads": 7},
            ["moh.active_heads must equal model.num_attention_heads (8), as moh.shared_heads does. Got 7."],
        ),
        ({"moh.router": "query_norm"}, []),
        (
            {"moh.router": "query_norm", "moh.shared_heads": 8, "moh.active_heads": 8},
            [
                "moh.router: query_norm needs a routed head: moh.shared_heads must be less than "
                "model.num_attention_heads (8). Got 8."
            ],
        ),
        (
            {"parallel.pipeline": 2, "parallel.context": 4},
            [
                "parallel.pipeline must be 1: pipeline parallelism is not supported; use tensor parallelism "
                "(parallel.tensor) and ZeRO (parallel.zero_stage) instead. Got 2.",
                "parallel.context must be 1: context parallelism is not supported; use sequence parallelism "
                "(parallel.sequence) and recomputation (train.recompute) instead. Got 4.",
            ],
        ),
        (
            {"parallel.tensor": 3},
            [
                "parallel.tensor must divide model.num_attention_heads (8) and model.num_query_groups (4). Got 3; "
                "nearest: 2 or 4."
            ],
        ),
        (
            {"parallel.tensor": 8, "model.num_query_groups": 2},
            ["parallel.tensor must divide model.num_query_groups (2). Got 8; nearest: 2."],
        ),
        (
            {"parallel.tensor": 3, "model.num_query_groups": None},
            ["parallel.tensor must divide model.num_attention_heads (8). Got 3; nearest: 2 or 4."],
        ),
        (
            {"parallel.tensor": 4, "model.vocab_size": 97, "model.ffn_hidden_size": 2},
            [
                "model.vocab_size must be divisible by parallel.tensor (4). Got 97; nearest: 96 or 100.",
                "model.ffn_hidden_size must be divisible by parallel.tensor (4). Got 2; nearest: 4.",
            ],
        ),
        ({"parallel.tensor": 2, "parallel.sequence": True}, []),
        (
            {"parallel.sequence": True},
            ["parallel.sequence needs parallel.tensor greater than 1. Got 1; set parallel.sequence to false."],
        ),
        (
            {"parallel.sequence": True, "parallel.tensor": 4, "train.sequence_length": 18},
            [
                "train.sequence_length must be divisible by parallel.tensor (4) with parallel.sequence. Got 18; "
                "nearest: 16 or 20."
            ],
        ),
        ({"parallel.zero_stage": 0, "train.precision": "fp32"}, []),
        ({"parallel.zero_stage": 2}, []),
        (
            {"parallel.zero_stage": 0, "train.precision": "bf16"},
            [
                "parallel.zero_stage must be 1, 2 or 3 with train.precision: bf16: DeepSpeed's stage 0 keeps no fp32 "
                "master weights then, and small updates are lost. Got 0."
            ],
        ),
        ({"parallel.zero_stage": 3, "parallel.offload_optimizer": True}, []),
        (
            {"parallel.zero_stage": 0, "parallel.offload_optimizer": True},
            [
                "parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3: it is ZeRO's own optimizer state that "
                "moves to host memory, and stage 0 has none. Got stage 0."
            ],
        ),
        (
            {"train.micro_batch_size": 8},
            ["train.global_batch_size must be divisible by train.micro_batch_size (8). Got 4; nearest: 8."],
        ),
        (
            {"optimizer.min_learning_rate": 2e-3, "optimizer.warmup_learning_rate": 1},
            [
                "optimizer.min_learning_rate must be at most optimizer.learning_rate (0.001). Got 0.002.",
                "optimizer.warmup_learning_rate must be at most optimizer.learning_rate (0.001). Got 1.",
            ],
        ),
        ({"optimizer.min_learning_rate": 1e-3, "optimizer.warmup_steps": 99}, []),
        ({"optimizer.warmup_steps": 100}, [f"optimizer.warmup_steps must be less than {_LENGTH}. Got 100."]),
        ({"optimizer.schedule": "wsd", "optimizer.warmup_steps": 75, "optimizer.decay_fraction": 0.25}, []),
        (
            {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 75, "optimizer.decay_fraction": 0.5},
            [
                f"optimizer.decay_fraction must leave room for optimizer.warmup_steps (75) in {_LENGTH}: at most "
                "0.25. Got 0.5."
            ],
        ),
        (
            {"data.ngram_baselines": True, "data.validation_fraction": 0},
            [
                "data.validation_fraction must be greater than 0 with data.ngram_baselines, which measures held-out "
                "text. Got 0."
            ],
        ),
    ],
)
def test_violated_rule_is_reported(configure, changes, messages):
    if not messages:
        validate(configure(changes))
        return
    with pytest.raises(UserError) as caught:
        configure(changes)
    assert str(caught.value).splitlines() == [f"test: {message}" for message in messages]


def test_validate_reports_every_violation(configure):
    config = configure()
    broken = replace(
        config, moh=replace(config.moh, active_heads=40), parallel=replace(config.parallel, tensor=3, pipeline=2)
    )
    with pytest.raises(UserError) as caught:
        validate(broken)
    assert [line.split(" must ")[0] for line in str(caught.value).splitlines()] == [
        "moh.active_heads",
        "parallel.pipeline",
        "parallel.tensor",
    ]


@settings(deadline=None)
@given(heads=st.integers(1, 12), shared=st.integers(0, 14), active=st.integers(1, 14))
def test_head_counts_are_valid_only_if_heads_can_be_routed(configure, heads, shared, active):
    changes = {
        "model.num_attention_heads": heads,
        "model.num_query_groups": None,
        "model.kv_channels": 4,
        "moh.shared_heads": shared,
        "moh.active_heads": active,
    }
    if shared < active <= heads or shared == active == heads:
        configure(changes)
    else:
        with pytest.raises(UserError, match=r"moh\.(active|shared)_heads must"):
            configure(changes)


def test_world_is_divided_into_replicas_and_accumulation_steps(configure):
    config = configure({"parallel.tensor": 2, "train.global_batch_size": 24, "train.micro_batch_size": 2})
    assert [data_parallel_size(config, world) for world in (2, 4, 6)] == [1, 2, 3]
    assert [gradient_accumulation_steps(config, world) for world in (2, 4, 6, 24)] == [12, 6, 4, 1]


@pytest.mark.parametrize(
    ("world", "message"),
    [
        (3, "divisible by parallel.tensor (2). Got 3; start 2 or 4, or set parallel.tensor to 1."),
        (1, "divisible by parallel.tensor (2). Got 1; start 2, or set parallel.tensor to 1."),
        (0, "divisible by parallel.tensor (2). Got 0; start 2, or set parallel.tensor to 1."),
    ],
)
def test_world_size_that_does_not_fit_is_reported(configure, world, message):
    with pytest.raises(UserError) as caught:
        gradient_accumulation_steps(configure({"parallel.tensor": 2}), world)
    assert str(caught.value) == f"The number of processes must be {message}"


@pytest.mark.parametrize(
    ("micro", "world", "nearest"),
    [
        (4, 3, "(4) times the data-parallel size (3). Got 32; nearest: 24 or 36."),
        (4, 16, "(4) times the data-parallel size (16). Got 32; nearest: 64; or set train.micro_batch_size to 2."),
        (1, 64, "(1) times the data-parallel size (64). Got 32; nearest: 64."),
    ],
)
def test_batch_size_that_does_not_fit_is_reported(configure, micro, world, nearest):
    config = configure({"train.global_batch_size": 32, "train.micro_batch_size": micro})
    with pytest.raises(UserError) as caught:
        gradient_accumulation_steps(config, world)
    assert str(caught.value) == f"train.global_batch_size must be divisible by train.micro_batch_size {nearest}"


@settings(deadline=None)
@given(batch=st.integers(1, 64), micro=st.integers(1, 8), tensor=st.sampled_from([1, 2, 4]), world=st.integers(1, 16))
def test_accumulation_steps_of_all_replicas_make_the_batch(configure, batch, micro, tensor, world):
    try:
        config = configure(
            {"train.global_batch_size": batch, "train.micro_batch_size": micro, "parallel.tensor": tensor}
        )
        steps = gradient_accumulation_steps(config, world)
    except UserError:
        assert world % tensor or batch % (micro * (world // tensor))
    else:
        assert steps * micro * data_parallel_size(config, world) == batch
