"""`bench_step.py --monitor on off`: measures what all monitoring costs per step, at the width of LLM-S.

The goal is under 1 %. There are two figures: the share of a step's CPU seconds that is spent in monitoring code
(counting heads, observing routers, timing parts, reducing, drawing and writing figures), and the time of steps with all
monitoring, the Prometheus file included, over that of steps that only reduce losses, in interleaved pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import bench_engine
import torch
import torch.distributed as dist
from timing import circumstances, median_and_range, ratios, take_turns

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.monitor.accumulator import MetricsAccumulator
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine, initialize_distributed
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.run_recorder import RunRecorder
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.telemetry import Telemetry

GOAL = 0.01


def unmonitored(config: Config, tokens: torch.Tensor, interval: int) -> Callable[[], None]:
    """``interval`` steps whose losses are reduced once and not shown; heads are not counted."""
    engine, layers = build(config)
    for layer in layers:
        layer.statistics.record = lambda routing: None
    metrics = MetricsAccumulator(groups.dp_group(), config.train.tokens_per_step)

    def run() -> None:
        for step in range(1, interval + 1):
            loss = token_losses(engine.model, tokens).mean()
            engine.backward(loss)
            norm = engine.step(1e-4)
            metrics.add(step, 1e-4, [loss.detach()], norm, None)
        metrics.flush()

    return run


def monitored(
    config: Config, tokens: torch.Tensor, interval: int, inside: bench_engine.Stopwatch
) -> Callable[[], None]:
    """The same steps with all monitoring of a run; ``inside`` measures the time spent in it."""
    engine, layers = build(config)
    session: Any = SimpleNamespace(
        config=config, engine=engine, device=torch.device("cpu"), world=World(0, 1, 0), first=True, start_step=0
    )
    recorder = RunRecorder(session, layers, StartupClock())
    telemetry = Telemetry(session, layers, groups.control_group())

    def flush_and_record(step: int) -> None:
        interval, stats = telemetry.flush()
        recorder.interval(interval, stats, step)

    begin, before, end, log = map(
        inside.around, (telemetry.begin_step, telemetry.before_update, telemetry.end_step, flush_and_record)
    )
    counted = cast(Callable[[list[Any]], torch.Tensor], inside.around(counts))
    for layer in layers:
        layer.statistics.record = inside.around(layer.statistics.record)

    @contextmanager
    def timed_part(name: str) -> Iterator[None]:
        part = telemetry.timer.part(name)
        inside.around(part.__enter__)()
        yield
        inside.around(part.__exit__)(None, None, None)

    for layer in layers:  # The observer's hooks are the only ones of a router.
        for handle, hook in layer.router._forward_hooks.items():
            layer.router._forward_hooks[handle] = inside.around(hook)
    done = 0

    def run() -> None:
        nonlocal done
        inside.turns.append(0.0)
        with recorder.training():
            for _ in range(interval):
                done += 1
                with timed_part("data"):
                    pass
                begin(done)
                with timed_part("forward"):
                    loss = token_losses(engine.model, tokens).mean()
                with timed_part("backward"):
                    engine.backward(loss)
                before()
                with timed_part("optimizer"):
                    norm = engine.step(1e-4)
                end(done, 1e-4, [loss.detach()], norm, counted(layers), skipped=False)
            log(done)

    return run


def build(config: Config) -> tuple[Engine, list[Any]]:
    model = bench_engine.fresh_model(config)
    return Engine(model, config, data_parallel=1, accumulation_steps=1), moh_layers(model)


def counts(layers: list[Any]) -> torch.Tensor:
    return torch.stack([layer.statistics.drain(torch.device("cpu")) for layer in layers])


def measure(arguments: argparse.Namespace) -> None:
    """Print both figures; with only one of on and off, its seconds per step."""
    bench_engine.with_allocator()
    settings = {
        "model.num_layers": arguments.layers,
        "model.vocab_size": arguments.vocabulary,
        "train.sequence_length": arguments.length,
        "train.global_batch_size": 1,
        "train.micro_batch_size": 1,
        "train.precision": "fp32",
        "monitor.log_interval": arguments.interval,
        "monitor.image_interval": 100,
    }
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"{key}={value}" for key, value in settings.items()]
        overrides += [f"run.dir={Path(folder) / 'run'}", f"monitor.prometheus={Path(folder) / 'run.prom'}"]
        config = load_config(bench_engine.CONFIG, overrides)
        Path(config.run.dir).mkdir()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        initialize_distributed(World(0, 1, 0))
        groups.initialize(tensor_parallel=1, seed=0)
        tokens = torch.randint(0, arguments.vocabulary, (1, arguments.length + 1))
        inside = bench_engine.Stopwatch()
        runs: dict[str, Callable[[], None]] = {}
        if "on" in arguments.monitor:
            runs["on"] = monitored(config, tokens, arguments.interval, inside)
        if "off" in arguments.monitor:
            runs["off"] = unmonitored(config, tokens, arguments.interval)
        turns = take_turns(runs, arguments.turns)
    for name in runs:
        print(f"monitor {name}: {statistics.median(turn[name] for turn in turns) / arguments.interval:.3f} s a step")
    if "on" in runs:
        # The first pass is a warm-up.
        shares = [spent / turn["on"] for spent, turn in zip(inside.turns[1:], turns, strict=True)]
        print(f"inside monitoring code: {statistics.median(shares):.3%} of a step; goal: under {GOAL:.0%}")
    if len(runs) == 2:
        print(f"on / off: {median_and_range(ratios(turns, 'on', 'off'), digits=4)}")
    print(f"{arguments.turns} turns of {arguments.interval} steps each; {circumstances()}; {arguments}")
