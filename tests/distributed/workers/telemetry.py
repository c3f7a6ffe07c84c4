"""What two ranks tell of one step under each layout, and what was counted by hand from the routing masks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from engine import joined

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.moh.observation import RoutingObserver
from moh_megatron.monitor.accumulator import Interval, MetricsAccumulator
from moh_megatron.monitor.alarms import Alarms, Signs
from moh_megatron.monitor.board import Board
from moh_megatron.monitor.heads import head_figures
from moh_megatron.monitor.tensorboard import TensorBoard
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {"tensor": 1},
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
}
RECOMPUTE = ("none", "selective", "full")
MICRO_BATCH = 2
DEAD_HEAD = 5


def count(masks: list[list[torch.Tensor]]) -> list[list[int]]:
    """[L][N] tokens that used each head, one by one; ``masks`` of each layer, [S, B, N] a micro-batch."""
    counts = []
    for of_layer in masks:
        counts.append([0] * of_layer[0].shape[-1])
        for mask in of_layer:
            for token in mask.flatten(0, 1).tolist():
                for head, used in enumerate(token):
                    counts[-1][head] += used
    return counts


def watch_first_passes(model: torch.nn.Module, batches: int) -> list[list[torch.Tensor]]:
    """Of each layer the masks of its first pass over each micro-batch: a pass that is repeated comes right after."""
    masks: list[list[torch.Tensor]] = [[] for _ in moh_layers(model)]
    for of_layer, layer in zip(masks, moh_layers(model), strict=True):

        def record(module: Any, inputs: Any, output: Any, of_layer: list[torch.Tensor] = of_layer) -> None:
            if not any(torch.equal(output.active, seen) for seen in of_layer):
                of_layer.append(output.active.detach().clone())

        layer.router.register_forward_hook(record)
    return masks


def one_step(config: Config, folder: Path | None, *, kill: bool = False) -> dict[str, Any]:
    """Train one step of four rows; rank 0 writes event files to ``folder``."""
    size = dist.get_world_size()
    replicas, accumulation = data_parallel_size(config, size), gradient_accumulation_steps(config, size)
    model = tiny.fresh_model(config, accumulation)
    layers = moh_layers(model)
    if kill:
        for layer in layers:
            assert layer.router.bias_steps is not None
            layer.router.bias_steps[DEAD_HEAD - 2] = -(10**6)
    engine = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    observer = RoutingObserver(layers)
    observer.on = True
    masks = watch_first_passes(model, accumulation)
    group = groups.data_group()
    metrics = MetricsAccumulator(
        group, config.train.tokens_per_step, groups.tensor_group() if config.parallel.sequence else None
    )
    losses = []
    for rows in tiny.tokens(4, seed=77).split(MICRO_BATCH)[group.rank() :: replicas]:
        loss = token_losses(engine.model, rows).mean()
        engine.backward(loss)
        losses.append(loss.detach())
    router_norm, parameter_norm = engine.router_gradient_norm(), engine.parameter_norm()
    norm = engine.step(1e-3)
    routers = torch.stack([layer.statistics.drain(torch.device("cpu")) for layer in layers])
    metrics.add(1, 1e-3, losses, norm, routers)
    metrics.observe(observer.drain())
    interval = metrics.flush()
    return {
        "by_hand": count(masks),
        "load": interval.head_load,
        "observed": interval.observed,
        "router_norm": None if router_norm is None else float(router_norm),
        "parameter_norm": float(parameter_norm),
        "alarms": _show(config, interval, layers, folder) if folder is not None else [],
    }


def _show(config: Config, interval: Interval, layers: Any, folder: Path) -> list[str]:
    assert interval.head_load is not None
    layout = HeadLayout(config.model.num_attention_heads, config.model.query_groups, config.moh.head_layout)
    ranks = [layout.local_heads(rank, config.parallel.tensor) for rank in range(config.parallel.tensor)]
    heads, top_k = [layer.router.heads for layer in layers], [layer.router.top_k for layer in layers]
    figures = head_figures(interval.head_load, heads, top_k, ranks)
    if dist.get_rank() == 0:
        board = Board(TensorBoard(folder, 0))
        board.heads(figures, {}, 1)
        board.close()
    return Alarms(config.monitor).check(Signs(1.0, figures))


def bare() -> dict[str, Any]:
    """Norms of one process: of all weights, and of the routers' gradients of the whole batch."""
    config = tiny.tiny_config()
    model = tiny.fresh_model(config, 2)
    for rows in tiny.tokens(4, seed=77).split(MICRO_BATCH):
        (token_losses(model, rows).mean() / 2).backward()
    norm = torch.nn.utils.get_total_norm
    routers = [p.grad for name, p in model.named_parameters() if ".router." in name and p.grad is not None]
    return {"router_norm": float(norm(routers)), "parameter_norm": float(norm(list(model.parameters())))}


if __name__ == "__main__":
    joined()
    folder = Path(sys.argv[1]).parent
    results: dict[Any, Any] = {"bare": bare()}
    for layout, parallel in LAYOUTS.items():
        for recompute in RECOMPUTE:
            config = tiny.tiny_config(parallel=parallel, train={"recompute": recompute})
            results[layout, recompute] = one_step(config, folder / f"{layout}_{recompute}")
        for stage in (0, 1, 2, 3):
            results[layout, stage] = one_step(tiny.tiny_config(parallel={**parallel, "zero_stage": stage}), None)
        config = tiny.tiny_config(parallel=parallel, moh={"balancing": "bias"})
        results[layout, "dead"] = one_step(config, folder / f"{layout}_dead", kill=True)
        config = tiny.tiny_config(parallel=parallel, moh={"router": "query_norm"})
        results[layout, "query_norm"] = one_step(config, None)
    torch.save({"folder": str(folder), **results}, sys.argv[1])
    dist.destroy_process_group()
