"""A few optimizer steps under each layout of two ranks, against a bare loop in one process."""

from __future__ import annotations

import sys
from typing import Any

import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.train.engine import Engine, adamw, initialize_distributed
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.world import World

STEPS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name}_zero{stage}": {**parallel, "zero_stage": stage}
    for name, parallel in {
        "tp1": {"tensor": 1},
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence": True},
    }.items()
    for stage in (0, 1, 2)
}


def global_batch(step: int) -> torch.Tensor:
    """[4, S + 1]: two micro-batches of two rows."""
    return tiny.tokens(4, seed=100 + step)


def bare_loop(moh: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """No engine, no attached losses: the total loss written out, whole batch gradients, torch's own clipping."""
    config = tiny.tiny_config(moh=moh or {})
    model = tiny.fresh_model(config)
    routed: list[torch.Tensor] = []
    for layer in moh_layers(model):
        layer.router.loss_scale = 0.0
        layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output.balance_loss))
    optimizer = adamw(model, config)
    losses, norms = [], []
    for step in range(STEPS):
        step_losses = []
        for rows in global_batch(step).split(2):
            routed.clear()
            loss = token_losses(model, rows).mean()
            balance = torch.stack(routed).mean()
            ((loss + config.moh.balance_coefficient * balance) / 2).backward()
            step_losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(step_losses) / 2)
    return {"losses": losses, "norms": norms}


def engine_loop(parallel: dict[str, Any], precision: str = "fp32", moh: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same steps through the engine."""
    config = tiny.tiny_config(parallel=parallel, train={"precision": precision}, moh=moh or {})
    size = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, size), data_parallel_size(config, size)
    model = tiny.fresh_model(config, accumulation)
    elements = sum(p.numel() for p in model.parameters())
    engine = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    rank = parallel_state.get_data_parallel_rank()
    losses, norms = [], []
    for step in range(STEPS):
        micro_batches = global_batch(step).split(2)[rank::replicas]
        step_losses = []
        for rows in micro_batches:
            loss = token_losses(engine.model, rows).mean()
            engine.backward(loss)
            step_losses.append(loss.detach())
        norms.append(float(engine.step(learning_rate(config.optimizer, step, config.train.steps))))
        mean = torch.stack(step_losses).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        losses.append(float(mean) / replicas)
    return {"losses": losses, "norms": norms, "elements": elements, "state_bytes": engine.optimizer_state_bytes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    assert world is not None
    initialize_distributed(world)
    results: dict[str, Any] = {"bare": bare_loop()}
    for name, parallel in LAYOUTS.items():
        results[name] = engine_loop(parallel)
    results["bare_query_norm"] = bare_loop({"router": "query_norm"})
    results["tp2_query_norm"] = engine_loop({"tensor": 2}, moh={"router": "query_norm"})
    for stage in (1, 2):
        results[f"tp2_zero{stage}_bf16"] = engine_loop({"tensor": 2, "zero_stage": stage}, "bf16")
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
