"""`bench_step.py engine`: measures an optimizer step through the engine against a bare loop with the same model.

One process, fp32, one micro-batch per step, at the width of LLM-S with MoH, samples in memory. The engine's steps are
those of the training loop: reading the batch, timers, telemetry, router statistics, watchdog, advancing the save in
flight, the agreement on stopping; without what is done once per logging interval. The bare loop gets finished batches.
Goals: 1.05 for ZeRO 0, 1.10 for ZeRO 1, our own code under 1 %.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timing import Turn, circumstances, markdown, median_and_range, ratios, take_turns
from torch import nn

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.data.batches import train_batches
from moh_megatron.data.dataset import Sequences
from moh_megatron.model.build import build_model, token_losses
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine, adamw, initialize_distributed
from moh_megatron.train.fault_tolerance.signals import StopRequest
from moh_megatron.train.fault_tolerance.watchdog import Watchdog
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.launcher import ALLOCATOR
from moh_megatron.train.loop import _Training
from moh_megatron.train.session import Session
from moh_megatron.train.startup_clock import StartupClock

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "llm_s_moh75.yaml"
GOALS = {0: 1.05, 1: 1.10}


class Stopwatch:
    """Measures the CPU seconds spent in the functions given to it, per turn."""

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


def bare_step(config: Config, rows: torch.Tensor) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, with one of the ``rows`` [N, S + 1] per step."""
    model = fresh_model(config)
    optimizer = adamw(model, config)
    batches = cycle(rows.split(1))

    def run() -> None:
        loss = token_losses(model, next(batches)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()

    return run


def engine_step(config: Config, rows: torch.Tensor, inside: Stopwatch) -> Callable[[], None]:
    """A step of the training loop; ``inside`` measures the time in DeepSpeed, that of the model included."""
    engine = Engine(fresh_model(config), config, data_parallel=1, accumulation_steps=1)
    for name in ("forward", "backward", "step"):
        setattr(engine.model, name, inside.around(getattr(engine.model, name)))
    training = new_training(config, engine, rows)
    batches = training.timer.iterate(
        "data",
        train_batches(
            training.session.train_dataset,
            global_batch_size=1,
            micro_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
            start_step=0,
            end_step=config.train.steps,
        ),
    )

    def run() -> None:
        inside.turns.append(0.0)
        training._train_step(next(batches))
        training.step += 1
        with training.timer.part("save"):
            training.saver.advance()
        training._stop_agreed()

    return run


def new_training(config: Config, engine: Engine, rows: torch.Tensor) -> _Training:
    """A run before its first step, whose samples are the ``rows`` in turn."""
    unused: Any = None  # Only validations and saves need these.
    session = Session(
        config=config,
        world=World(0, 1, 0),
        device=rows.device,
        engine=engine,
        tokenizer=unused,
        hf_extras=unused,
        data=unused,
        train_dataset=Sequences(lambda index: rows[index % len(rows)], config.train.steps),
        validation_datasets={},
        start_step=0,
        teacher=None,
    )
    watchdog = Watchdog(session.world, config.train.timeout_seconds, lambda message, code: None)
    return _Training(session, StopRequest(), watchdog, StartupClock())


def fresh_model(config: Config) -> nn.Module:
    torch.manual_seed(config.run.seed)
    return build_model(config)


def report(turns: list[Turn], inside: dict[str, Stopwatch]) -> str:
    """The parts of a step's time in milliseconds, and ratios; medians over turns, ranges in brackets."""
    rows = []
    for stage, goal in GOALS.items():
        name = f"ZeRO {stage}"
        # The first pass is a warm-up.
        own_code = [turn[name] - within for turn, within in zip(turns, inside[name].turns[1:], strict=True)]
        deepspeed = [within - turn["bare"] for turn, within in zip(turns, inside[name].turns[1:], strict=True)]
        share = statistics.median(seconds / turn["bare"] for seconds, turn in zip(own_code, turns, strict=True))
        rows.append(
            (
                name,
                f"{1000 * statistics.median(turn['bare'] for turn in turns):.0f}",
                f"{1000 * statistics.median(deepspeed):.0f}",
                f"{1000 * statistics.median(own_code):.1f} ({share:.2%})",
                median_and_range(ratios(turns, name, "bare"), digits=3),
                f"{goal:.2f}",
            )
        )
    head = ("", "bare loop, ms", "DeepSpeed beyond it, ms", "our own code, ms", "engine / bare loop", "goal")
    return markdown(head, rows)


def add_arguments(parser: argparse.ArgumentParser, turns: int = 24) -> None:
    """Add the options of `bench_step.py engine`."""
    parser.add_argument("--turns", type=int, default=turns, help="interleaved turns, after one that is not timed")
    parser.add_argument("--length", type=int, default=1024, help="tokens a step")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)


def with_allocator() -> None:
    """Restart this process with the launcher's settings of the allocator, from which a bare loop gains, too."""
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
    with_allocator()
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            name: load_config(
                CONFIG, [*(f"{key}={value}" for key, value in values.items()), f"run.dir={folder}/{name}"]
            )
            for name, values in stages.items()
        }
        compare(configs, arguments)


def compare(configs: dict[str, Config], arguments: argparse.Namespace) -> None:
    """Time the engine with each of ``configs`` and the bare loop, in turns."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_distributed(World(0, 1, 0))
    groups.initialize(tensor_parallel=1, seed=0)
    rows = torch.randint(0, arguments.vocabulary, (8, arguments.length + 1))
    inside = {name: Stopwatch() for name in configs}
    runs = {name: engine_step(config, rows, inside[name]) for name, config in configs.items()}
    runs["bare"] = bare_step(next(iter(configs.values())), rows)
    turns = take_turns(runs, arguments.turns)
    print(report(turns, inside))
    print(f"\n{arguments.turns} turns of one step each; {circumstances()}; {arguments}")
