"""What a user may add to DeepSpeed's configuration, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.train.deepspeed_config import deepspeed_config
from moh_megatron.train.engine import check_deepspeed_section

Tiny = Callable[..., Config]


def with_section(tiny: Tiny, section: dict[str, Any], changes: dict[str, Any] | None = None) -> Config:
    return dataclasses.replace(tiny(changes), deepspeed=section)


def error_lines(config: Config, world_size: int = 2) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_deepspeed_section(config, world_size)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("cuda", [False, True])
def test_values_derived_from_other_sections(tiny: Tiny, stage: int, cuda: bool) -> None:
    changes = {"parallel.zero_stage": stage, "parallel.offload_optimizer": True, "train.precision": "bf16"}
    settings = deepspeed_config(tiny(changes), 2, 2, cuda=cuda)
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (4, 2)
    assert settings["bf16"]["enabled"]
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    zero = settings["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["overlap_comm"] is cuda
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": cuda, "ratio": 1.0, "super_offload": False}
    assert not settings["zero_force_ds_cpu_optimizer"]


def test_buckets_are_no_larger_than_the_model(tiny: Tiny) -> None:
    small = deepspeed_config(tiny(), 1, 4, cuda=True)["zero_optimization"]
    large = deepspeed_config(tiny({"model.ffn_hidden_size": 2**24}), 1, 4, cuda=True)["zero_optimization"]
    assert small["reduce_bucket_size"] == small["allgather_bucket_size"] < 100_000
    assert large["reduce_bucket_size"] == large["allgather_bucket_size"] == 200_000_000


def test_users_may_add_keys_and_tune_values(tiny: Tiny) -> None:
    section = {
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 1000,
            "round_robin_gradients": True,
            "offload_optimizer": {"buffer_count": 5},
        },
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 2},
        "comms_logger": {"enabled": False, "prof_all": True},
        "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": True}},
        "activation_checkpointing": {},
        "timers": {"throughput": {"enabled": False}},
        "communication_data_type": "bf16",
        "csv_monitor": {"enabled": False},
    }
    config = with_section(tiny, section)
    check_deepspeed_section(config, 2)
    settings = deepspeed_config(config, 2, 2, cuda=False)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert settings["zero_optimization"]["allgather_bucket_size"] > 1000
    assert settings["communication_data_type"] == "bf16"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "deepspeed.zero_optimization.stage must be 1, as parallel.zero_stage makes it. Got 3; change "
            "parallel.zero_stage, or leave the key out.",
        ),
        (
            {"train_batch_size": 8},
            "deepspeed.train_batch_size must be 4, as train.global_batch_size makes it. Got 8; change "
            "train.global_batch_size, or leave the key out.",
        ),
        (
            {"bf16": {"enabled": True}},
            "deepspeed.bf16.enabled must be false, as train.precision makes it. Got true; change train.precision, or "
            "leave the key out.",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.device must be none, as parallel.offload_optimizer makes "
            "it. Got cpu; change parallel.offload_optimizer, or leave the key out.",
        ),
        (
            {"gradient_clipping": {"x": 1}},
            "deepspeed.gradient_clipping must be 1.0, as optimizer.gradient_clipping makes it. Got a mapping; change "
            "optimizer.gradient_clipping, or leave the key out.",
        ),
        ({"zero_optimization": True}, "deepspeed.zero_optimization must be a mapping of keys. Got true."),
        (
            {"optimizer": {"type": "Adam"}},
            "deepspeed.optimizer.type: the optimizer section decides this; leave deepspeed.optimizer out.",
        ),
        (
            {"bf16": {"check_grad_overflow": False}},
            "deepspeed.bf16.check_grad_overflow must be true, as train.max_bad_steps makes it. Got false; change ",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "deepspeed.zero_optimization.offload_param.device: only stage 3 reads it. Got parallel.zero_stage 1; set "
            "that to 3, or leave the key out.",
        ),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "deepspeed.zero_optimization.zero_quantized_weights"),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "deepspeed.zero_optimization.compute_grad_norm must be true, as optimizer.gradient_clipping makes it. ",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "deepspeed.zero_optimization.offload_optimizer.ratio must be 1.0, as parallel.offload_optimizer makes it.",
        ),
        ({"managed_gradient_accumulation": False}, "deepspeed.managed_gradient_accumulation must be true, as train."),
        ({"prescale_gradients": True}, "deepspeed.prescale_gradients must be false, as train.global_batch_size makes"),
        ({"zero_allow_untested_optimizer": False}, "deepspeed.zero_allow_untested_optimizer must be true, as the opti"),
        (
            {"data_efficiency": {"enabled": True}},
            "deepspeed.data_efficiency.enabled: the data section decides this; leave deepspeed.data_efficiency out.",
        ),
        ({"hybrid_engine": {"enabled": True}}, "deepspeed.hybrid_engine.enabled: the train section decides this;"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "deepspeed.zero_optimization.zenflow.topk_ratio: "),
        ({"wall_clock_breakdwn": True}, "deepspeed.wall_clock_breakdwn: unknown key; did you mean"),
        (
            {"zero_optimization": {"redcue_scatter": True}},
            "deepspeed.zero_optimization.redcue_scatter: unknown key; did you mean 'reduce_scatter'?",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"pin_memry": True}}},
            "deepspeed.zero_optimization.offload_optimizer.pin_memry: unknown key; did you mean 'pin_memory'?",
        ),
        (
            {"flops_profiler": {"enabeld": True}},
            "deepspeed.flops_profiler.enabeld: unknown key; did you mean 'enabled'?",
        ),
        ({"qqq": 1}, "deepspeed.qqq: unknown key; deepspeed has the keys activation_checkpointing, "),
        ({"zero_optimization": {"reduce_scatter": "maybe"}}, "deepspeed.zero_optimization.reduce_scatter: "),
        ({"communication_data_type": "fp4"}, "deepspeed: Invalid communication_data_type."),
        ({"amp": {"enabled": True}}, "deepspeed: NVIDIA Apex AMP integration has been removed."),
    ],
)
def test_contradictions_and_unknown_keys_are_refused(tiny: Tiny, section: dict[str, Any], message: str) -> None:
    (line,) = error_lines(with_section(tiny, section))
    assert line.startswith(message)


def test_all_errors_are_reported_at_once(tiny: Tiny) -> None:
    assert len(error_lines(with_section(tiny, {"gradient_clipping": 3, "zero_optimization": {"stage": 2}}))) == 2
    assert len(error_lines(with_section(tiny, {"zero_optimization": {"stge": 2, "overlap_com": True}, "x": 1}))) == 2
