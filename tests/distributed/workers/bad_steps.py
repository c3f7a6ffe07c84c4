"""Takes steps with a loss or gradient that is not finite on one rank; saves what they change, and the later steps."""

from __future__ import annotations

import math
import sys
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import token_losses
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine, initialize_distributed
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.schedule import learning_rate

BAD_RANK = 1
GOOD_STEPS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2_zero0": {"zero_stage": 0},
    "dp2_zero1": {"zero_stage": 1},
    "dp2_zero2": {"zero_stage": 2},
    "tp2_zero0": {"tensor": 2, "zero_stage": 0},
    "tp2_zero1": {"tensor": 2, "zero_stage": 1},
    "dp2_zero3": {"zero_stage": 3},
    "dp2_zero1_offload": {"zero_stage": 1, "offload_optimizer": True},
    "dp2_zero2_offload": {"zero_stage": 2, "offload_optimizer": True},
    "dp2_zero3_offload": {"zero_stage": 3, "offload_optimizer": True},
    "tp2_zero2": {"tensor": 2, "zero_stage": 2},
    "tp2_zero3": {"tensor": 2, "zero_stage": 3},
}
KINDS = ("nan_loss", "constant_inf_loss", "nan_gradient", "inf_gradient_early")


def state(engine: Engine) -> list[Tensor]:
    """Return copies of all that a step changes: weights, master weights, Adam's moments and counts."""
    optimizer = engine._optimizer
    tensors = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]  # this rank's shard in stage 3
    tensors += [p.detach() for group in optimizer.param_groups for p in group["params"]]
    tensors += [value for slots in optimizer.state.values() for value in slots.values() if torch.is_tensor(value)]
    return [tensor.clone() for tensor in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(engine: Engine, config: Any, number: int, accumulation: int, bad: str | None = None) -> float:
    """Take one step; ``bad`` names the fault on one rank."""
    group = groups.dp_group()
    norm = torch.zeros(())
    for micro, rows in enumerate(tiny.tokens(4, seed=100 + number).split(2)[group.rank() :: group.size()]):
        loss = token_losses(engine.model, rows).mean()
        fault = bad if dist.get_rank() == BAD_RANK else None
        handle = None
        if fault == "nan_loss" and micro == accumulation - 1:
            loss = loss * math.nan
        elif fault == "constant_inf_loss":
            loss = loss + math.inf  # its gradient would be finite
        elif (fault == "nan_gradient" and micro == accumulation - 1) or (fault == "inf_gradient_early" and micro == 0):
            value = math.nan if fault == "nan_gradient" else math.inf
            parameter = next(p for name, p in engine.module.named_parameters() if "linear_fc1.weight" in name)
            handle = parameter.register_hook(lambda gradient, value=value: gradient * value)
        engine.backward(loss)
        if handle is not None:
            handle.remove()
    norm = engine.step(learning_rate(config.optimizer, number, config.train.steps))
    return float(norm)


def run(parallel: dict[str, Any], precision: str, bad: str | None) -> dict[str, Any]:
    """Take two good steps, the bad one, and two good ones; leave the bad one out without ``bad``."""
    config = tiny.tiny_config(parallel=parallel, train={"precision": precision})
    size = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, size), data_parallel_size(config, size)
    engine = Engine(
        tiny.fresh_model(config, accumulation), config, data_parallel=replicas, accumulation_steps=accumulation
    )
    found: dict[str, Any] = {}
    for number in range(GOOD_STEPS):
        step(engine, config, number, accumulation)
    if bad:
        before = state(engine)
        found["norm"] = step(engine, config, GOOD_STEPS, accumulation, bad)
        found["applied"] = engine.applied
        found["unchanged"] = same(before, state(engine))
    found["norms"] = [step(engine, config, GOOD_STEPS + 1 + later, accumulation) for later in range(2)]
    found["applied_afterwards"] = engine.applied
    found["state"] = state(engine)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    assert world is not None
    initialize_distributed(world)
    results: dict[str, Any] = {}
    cases = [(name, parallel, "fp32") for name, parallel in LAYOUTS.items()]
    cases += [
        (f"dp2_zero{stage}_bf16", LAYOUTS[f"dp2_zero{stage}"], "bf16")
        for stage in ("1", "2", "3", "1_offload", "2_offload", "3_offload")
    ]
    for name, parallel, precision in sorted(cases, key=lambda case: "tensor" in case[1]):
        good = run(parallel, precision, None)
        for kind in KINDS:
            found = run(parallel, precision, kind)
            found["same_without"] = same(found.pop("state"), good["state"]) and found["norms"] == good["norms"]
            results[f"{name}-{kind}"] = found
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
