"""`bench_step.py --monitor on off`: what all monitoring costs a step, at the width of LLM-S. Goal: under 1 %.

Two figures: CPU seconds spent inside monitoring code (heads counted, routers looked at, parts timed, figures reduced,
drawn and written), over the step's; and steps with everything on, Prometheus' file too, over steps whose losses are
reduced and whose heads nobody counts, in interleaved pairs.
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
from moh_megatron.train.telemetry import Telemetry

GOAL = 0.01


def silent(config: Config, tokens: torch.Tensor, interval: int) -> Callable[[], None]:
    """``interval`` steps whose losses are reduced once, and shown nowhere; heads are not counted."""
    engine, layers = made(config)
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


def watched(config: Config, tokens: torch.Tensor, interval: int, inside: bench_engine.Stopwatch) -> Callable[[], None]:
    """The same with all that a run tells; ``inside`` measures what that takes."""
    engine, layers = made(config)
    session: Any = SimpleNamespace(
        config=config, engine=engine, device=torch.device("cpu"), world=World(0, 1, 0), first=True, start_step=0
    )
    telemetry = Telemetry(session, layers, groups.control_group())
    begin, before, end, log = map(
        inside.around, (telemetry.begin_step, telemetry.before_update, telemetry.end_step, telemetry.log)
    )
    counted = cast(Callable[[list[Any]], torch.Tensor], inside.around(counts))
    for layer in layers:
        layer.statistics.record = inside.around(layer.statistics.record)

    @contextmanager
    def part(name: str) -> Iterator[None]:
        piece = telemetry.timer.part(name)
        inside.around(piece.__enter__)()
        yield
        inside.around(piece.__exit__)(None, None, None)

    observer = telemetry._observer
    for layer, seen in zip(layers, observer._seen, strict=True):
        layer.router._forward_hooks.clear()
        timed = cast(Callable[..., None], inside.around(observer._look))
        layer.router.register_forward_hook(
            lambda module, inputs, output, seen=seen, timed=timed: timed(seen, module, inputs, output)
        )
    done = 0

    def run() -> None:
        nonlocal done
        inside.turns.append(0.0)
        for _ in range(interval):
            done += 1
            with part("data"):
                pass
            begin(done)
            with part("forward"):
                loss = token_losses(engine.model, tokens).mean()
            with part("backward"):
                engine.backward(loss)
            before()
            with part("optimizer"):
                norm = engine.step(1e-4)
            end(done, 1e-4, [loss.detach()], norm, counted(layers), skipped=False)
        log(done)

    return run


def made(config: Config) -> tuple[Engine, list[Any]]:
    model = bench_engine.fresh_model(config)
    return Engine(model, config, data_parallel=1, accumulation_steps=1), moh_layers(model)


def counts(layers: list[Any]) -> torch.Tensor:
    return torch.stack([layer.statistics.drain(torch.device("cpu")) for layer in layers])


def measure(arguments: argparse.Namespace) -> None:
    """Print both figures; with only one of on and off, its seconds a step."""
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
            runs["on"] = watched(config, tokens, arguments.interval, inside)
        if "off" in arguments.monitor:
            runs["off"] = silent(config, tokens, arguments.interval)
        turns = take_turns(runs, arguments.turns)
    for name in runs:
        print(f"monitor {name}: {statistics.median(turn[name] for turn in turns) / arguments.interval:.3f} s a step")
    if "on" in runs:
        # The first pass was nobody's turn.
        shares = [spent / turn["on"] for spent, turn in zip(inside.turns[1:], turns, strict=True)]
        print(f"inside monitoring code: {statistics.median(shares):.3%} of a step; goal: under {GOAL:.0%}")
    if len(runs) == 2:
        print(f"on / off: {median_and_range(ratios(turns, 'on', 'off'), digits=4)}")
    print(f"{arguments.turns} turns of {arguments.interval} steps each; {circumstances()}; {arguments}")
