"""Takes a few optimizer steps at each layout of two ranks, and the same steps in a plain loop of one process."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.model.tensors import model_tensors
from moh_megatron.train.engine import Engine, adamw, initialize_distributed
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.schedule import learning_rate

STEPS = 4
MICRO_BATCH = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    f"{name}_zero{stage}": {**parallel, "zero_stage": stage}
    for name, parallel in {
        "tp1": {"tensor": 1},
        "tp2": {"tensor": 2},
        "tp2_sp": {"tensor": 2, "sequence": True},
    }.items()
    for stage in (0, 1, 2, 3)
}

MakeOptimizer = Callable[[torch.nn.Module, Config], torch.optim.Optimizer]


def micro_batches(config: Config, step: int) -> tuple[torch.Tensor, ...]:
    """Return batches [2, S + 1] of all data-parallel ranks; every other step has the same, so that losses can fall."""
    return tiny.tokens(config.train.global_batch_size, seed=100 + step % 2).split(MICRO_BATCH)


def plain_loop(config: Config, make_optimizer: MakeOptimizer = adamw, steps: int = STEPS) -> dict[str, Any]:
    """Train without the engine: the total loss is written out, gradients are of the full batch, torch clips them."""
    model = tiny.fresh_model(config)
    routed: list[torch.Tensor] = []
    for layer in moh_layers(model):
        layer.router.loss_scale = 0.0
        layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output.balance_loss))
    optimizer = make_optimizer(model, config)
    losses, norms = [], []
    for step in range(steps):
        batches, step_losses = micro_batches(config, step), []
        for rows in batches:
            routed.clear()
            loss = token_losses(model, rows).mean()
            balance = torch.stack(routed).mean()
            ((loss + config.moh.balance_coefficient * balance) / len(batches)).backward()
            step_losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(step_losses) / len(step_losses))
    return {"losses": losses, "norms": norms, "weights": dict(model_tensors(model))}


def engine_loop(config: Config, make_optimizer: MakeOptimizer = adamw, steps: int = STEPS) -> dict[str, Any]:
    """Take the same steps with the engine."""
    size = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, size), data_parallel_size(config, size)
    model = tiny.fresh_model(config, accumulation)
    elements = sum(p.numel() for p in model.parameters())
    engine = Engine(
        model, config, data_parallel=replicas, accumulation_steps=accumulation, make_optimizer=make_optimizer
    )
    rank = parallel_state.get_data_parallel_rank()
    losses, norms = [], []
    for step in range(steps):
        step_losses = []
        for rows in micro_batches(config, step)[rank::replicas]:
            loss = token_losses(engine.model, rows).mean()
            engine.backward(loss)
            step_losses.append(loss.detach())
        norms.append(float(engine.step(learning_rate(config.optimizer, step, config.train.steps))))
        mean = torch.stack(step_losses).mean()
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group())
        losses.append(float(mean) / replicas)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: weight.clone() for name, weight in engine.weights()},
        "elements": elements,
        "resting_elements": sum(p.numel() for p in model.parameters()),
        "state_bytes": engine.optimizer_state_bytes,
    }


def join() -> World:
    """Join the process group; return the rank of this process."""
    torch.set_num_threads(1)
    # Stage 3 collects garbage for each engine; freezing excludes the objects of the imports.
    gc.freeze()
    world = World.from_environment()
    assert world is not None
    initialize_distributed(world)
    return world


if __name__ == "__main__":
    join()
    query_norm: dict[str, Any] = {"router": "query_norm"}
    results: dict[str, Any] = {"plain": plain_loop(tiny.tiny_config())}
    for name, parallel in LAYOUTS.items():
        results[name] = engine_loop(tiny.tiny_config(parallel=parallel))
    results["plain_query_norm"] = plain_loop(tiny.tiny_config(moh=query_norm))
    results["tp2_query_norm"] = engine_loop(tiny.tiny_config(parallel={"tensor": 2}, moh=query_norm))
    for stage in (1, 2, 3):
        sections = {"parallel": {"tensor": 2, "zero_stage": stage}, "train": {"precision": "bf16"}}
        results[f"tp2_zero{stage}_bf16"] = engine_loop(tiny.tiny_config(**sections))
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
