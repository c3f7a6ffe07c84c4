"""`bench_step.py engine`: an optimizer step through the engine against a bare loop, the same model and torch optimizer.

One process, fp32, one micro-batch a step, at the width of LLM-S with MoH. The engine's steps do all that the training
loop does between two logging intervals. Goals: 1.05 for ZeRO 0, 1.10 for ZeRO 1, our own code under 1 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from timing import Turn, circumstances, markdown, median_and_range, ratios, take_turns
from torch import nn

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, moh_layers, token_losses
from moh_megatron.monitor.accumulator import MetricsAccumulator
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine, adamw, initialize_distributed
from moh_megatron.train.launcher import ALLOCATOR
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.world import World

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "llm_s_moh75.yaml"
GOALS = {0: 1.05, 1: 1.10}


class Stopwatch:
    """CPU seconds spent inside the functions given to it."""

    def __init__(self) -> None:
        self.turns: list[float] = []

    def around(self, function: Callable[..., object]) -> Callable[..., object]:
        def timed(*args: object, **options: object) -> object:
            start = time.process_time()
            try:
                return function(*args, **options)
            finally:
                self.turns[-1] += time.process_time() - start

        return timed


def bare_step(config: Config, tokens: torch.Tensor) -> Callable[[], None]:
    """Forward, backward, clipping, AdamW."""
    model = fresh_model(config)
    optimizer = adamw(model, config)

    def run() -> None:
        loss = token_losses(model, tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return run


def engine_step(config: Config, tokens: torch.Tensor, inside: Stopwatch) -> Callable[[], None]:
    """The training loop's step; ``inside`` measures what is spent in DeepSpeed, the model's own work included."""
    model = fresh_model(config)
    layers = moh_layers(model)
    engine = Engine(model, config, data_parallel=1, accumulation_steps=1)
    for name in ("forward", "backward", "step"):
        setattr(engine.model, name, inside.around(getattr(engine.model, name)))
    metrics = MetricsAccumulator(groups.data_group(), config.train.tokens_per_step)
    asked = torch.zeros(1, dtype=torch.int32)

    def run() -> None:
        inside.turns.append(0.0)
        loss = token_losses(engine.model, tokens).mean()
        engine.backward(loss)
        lr = learning_rate(config.optimizer, len(inside.turns), config.train.steps)
        norm = engine.step(lr)
        routers = torch.stack([layer.statistics.drain(tokens.device) for layer in layers])
        metrics.add(len(inside.turns), lr, [loss.detach()], norm, routers)
        dist.all_reduce(asked)

    return run


def fresh_model(config: Config) -> nn.Module:
    torch.manual_seed(config.run.seed)
    return build_model(config)


def report(turns: list[Turn], inside: dict[str, Stopwatch]) -> str:
    """Where the time of a step goes, milliseconds and ratios; medians over turns, ranges in brackets."""
    rows = []
    for stage, goal in GOALS.items():
        name = f"ZeRO {stage}"
        # The first pass was nobody's turn.
        own = [turn[name] - within for turn, within in zip(turns, inside[name].turns[1:], strict=True)]
        theirs = [within - turn["bare"] for turn, within in zip(turns, inside[name].turns[1:], strict=True)]
        share = statistics.median(mine / turn["bare"] for mine, turn in zip(own, turns, strict=True))
        rows.append(
            (
                name,
                f"{1000 * statistics.median(turn['bare'] for turn in turns):.0f}",
                f"{1000 * statistics.median(theirs):.0f}",
                f"{1000 * statistics.median(own):.1f} ({share:.2%})",
                median_and_range(ratios(turns, name, "bare"), digits=3),
                f"{goal:.2f}",
            )
        )
    head = ("", "bare loop, ms", "DeepSpeed beyond it, ms", "our own code, ms", "engine / bare loop", "goal")
    return markdown(head, rows)


def add_arguments(parser: argparse.ArgumentParser, turns: int = 24) -> None:
    """Those of `bench_step.py engine`."""
    parser.add_argument("--turns", type=int, default=turns, help="interleaved turns, after one that is not timed")
    parser.add_argument("--length", type=int, default=1024, help="tokens a step")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)


def with_allocator() -> None:
    """Begin again with the launcher's settings of the allocator, before its first use; a bare loop gains by it too."""
    if os.environ.keys().isdisjoint(ALLOCATOR):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)


def measure(arguments: argparse.Namespace) -> None:
    """Print the table of `bench_step.py engine`."""
    sizes = {
        "model.num_layers": arguments.layers,
        "model.vocab_size": arguments.vocabulary,
        "train.sequence_length": arguments.length,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.precision": "fp32",
    }
    stages = {f"ZeRO {stage}": {**sizes, "parallel.zero_stage": stage} for stage in GOALS}
    configs = {
        name: load_config(CONFIG, [f"{key}={value}" for key, value in each.items()]) for name, each in stages.items()
    }
    with_allocator()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_distributed(World(0, 1, 0))
    groups.initialize(tensor_parallel=1, seed=0)
    tokens = torch.randint(0, arguments.vocabulary, (1, arguments.length + 1))
    inside = {name: Stopwatch() for name in configs}
    runs = {name: engine_step(config, tokens, inside[name]) for name, config in configs.items()}
    runs["bare"] = bare_step(next(iter(configs.values())), tokens)
    turns = take_turns(runs, arguments.turns)
    print(report(turns, inside))
    print(f"\n{arguments.turns} turns of one step each; {circumstances()}; {arguments}")
