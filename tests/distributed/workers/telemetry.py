"""The figures of one step on two ranks under each layout, and counts made by hand from the routing masks."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
import torch.distributed as dist
from engine import join

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.run_recorder import RunRecorder
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.telemetry import Telemetry

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"tensor": 1},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
}
RECOMPUTE = ("none", "selective", "full")
MICRO_BATCH = 2
DEAD_HEAD = 5


class Messages(logging.Handler):
    """Collects the warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def count(masks: list[list[torch.Tensor]]) -> list[list[int]]:
    """[L][N] tokens that used each head, counted one by one; ``masks``: [S, B, N] per layer and micro-batch."""
    counts = []
    for layer_masks in masks:
        counts.append([0] * layer_masks[0].shape[-1])
        for mask in layer_masks:
            for token in mask.flatten(0, 1).tolist():
                for head, used in enumerate(token):
                    counts[-1][head] += used
    return counts


def record_first_passes(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    """The masks of each layer's first pass over each micro-batch, without passes that are recomputed."""
    masks: list[list[torch.Tensor]] = [[] for _ in moh_layers(model)]
    for layer_masks, layer in zip(masks, moh_layers(model), strict=True):

        def record(module: Any, inputs: Any, output: Any, recorded: list[torch.Tensor] = layer_masks) -> None:
            if not any(torch.equal(output.active, mask) for mask in recorded):
                recorded.append(output.active.detach().clone())

        layer.router.register_forward_hook(record)
    return masks


def one_step(config: Config, folder: Path, *, kill: bool = False) -> dict[str, Any]:
    """Train and record one step of four rows as training does; rank 0 writes event files below ``folder``."""
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=str(folder)),
        monitor=dataclasses.replace(config.monitor, log_interval=1, head_scalars=True, alarm_steps=1),
    )
    size = dist.get_world_size()
    replicas, accumulation = data_parallel_size(config, size), gradient_accumulation_steps(config, size)
    model = tiny.fresh_model(config, accumulation)
    layers = moh_layers(model)
    if kill:
        for layer in layers:
            assert layer.router.bias_steps is not None
            layer.router.bias_steps[DEAD_HEAD - 2] = -(10**6)
    engine = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    masks = record_first_passes(model)
    group = groups.dp_group()
    handler = Messages()
    logging.getLogger("moh_megatron").addHandler(handler)
    session: Any = SimpleNamespace(
        config=config,
        engine=engine,
        device=torch.device("cpu"),
        world=World(dist.get_rank(), size, dist.get_rank()),
        first=dist.get_rank() == 0,
        start_step=0,
    )
    control_group = dist.group.WORLD
    assert control_group is not None
    recorder = RunRecorder(session, layers, StartupClock())
    telemetry = Telemetry(session, layers, control_group)
    telemetry.begin_step(1)
    losses = []
    for rows in tiny.tokens(4, seed=77).split(MICRO_BATCH)[group.rank() :: replicas]:
        loss = token_losses(engine.model, rows).mean()
        engine.backward(loss)
        losses.append(loss.detach())
    router_norm, parameter_norm = engine.router_gradient_norm(), engine.parameter_norm()
    telemetry.before_update()
    norm = engine.step(1e-3)
    routers = torch.stack([layer.statistics.drain(torch.device("cpu")) for layer in layers])
    telemetry.end_step(1, 1e-3, losses, norm, routers, skipped=False)
    interval, stats = telemetry.flush()
    with recorder.training():
        recorder.interval(interval, stats, 1)
    recorder.close()
    logging.getLogger("moh_megatron").removeHandler(handler)
    return {
        "by_hand": count(masks),
        "load": interval.head_load,
        "observed": interval.observed,
        "router_norm": None if router_norm is None else float(router_norm),
        "parameter_norm": float(parameter_norm),
        "messages": handler.messages,
    }


def single_process() -> dict[str, Any]:
    """The norm of all weights, and that of the routers' gradients of the whole batch, in one process."""
    config = tiny.tiny_config()
    model = tiny.fresh_model(config, 2)
    for rows in tiny.tokens(4, seed=77).split(MICRO_BATCH):
        (token_losses(model, rows).mean() / 2).backward()
    norm = torch.nn.utils.get_total_norm
    routers = [p.grad for name, p in model.named_parameters() if ".router." in name and p.grad is not None]
    return {"router_norm": float(norm(routers)), "parameter_norm": float(norm(list(model.parameters())))}


if __name__ == "__main__":
    join()
    folder = Path(sys.argv[1]).parent
    results: dict[Any, Any] = {"single process": single_process()}
    for layout, parallel in LAYOUTS.items():
        for recompute in RECOMPUTE:
            config = tiny.tiny_config(parallel=parallel, train={"recompute": recompute})
            results[layout, recompute] = one_step(config, folder / f"{layout}_{recompute}")
        for stage in (0, 1, 2, 3):
            config = tiny.tiny_config(parallel={**parallel, "zero_stage": stage})
            results[layout, stage] = one_step(config, folder / f"{layout}_{stage}")
        config = tiny.tiny_config(parallel=parallel, moh={"balancing": "bias"})
        results[layout, "dead"] = one_step(config, folder / f"{layout}_dead", kill=True)
        config = tiny.tiny_config(parallel=parallel, moh={"router": "query_norm"})
        results[layout, "query_norm"] = one_step(config, folder / f"{layout}_query_norm")
    torch.save({"folder": str(folder), **results}, sys.argv[1])
    dist.destroy_process_group()
