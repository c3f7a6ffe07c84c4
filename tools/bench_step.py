#!/usr/bin/env python
"""Time a training step: its model work against the dense twin's, and the engine around it against a bare loop.

.venv/bin/python tools/bench_step.py attention [--config FILE] [--lengths 2048 4096] [--turns 7]
.venv/bin/python tools/bench_step.py engine [--turns 24] [--length 1024] [--layers 2] [--vocabulary 8192]
.venv/bin/python tools/bench_step.py --monitor on off [--turns 20] [--interval 10]

`attention`: what skipping heads saves in the transformer stack (no embedding, no head) and in the whole model. Both
models are the project's own, with the same fused attention; they take turns in one process. The table shows the
measured ratio beside the one that counts of floating-point operations predict (`monitor/flops.py`, executed), and the
rise of resident memory in one forward + backward pass of the stack, measured once in a process of its own.

`engine`: see `bench_engine.py`. `--monitor`: see `bench_monitor.py`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import bench_engine
import bench_monitor
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from timing import Turn, circumstances, markdown, median_and_range, peak_megabytes, ratios, take_turns
from torch import Tensor
from tqdm import tqdm

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.model.attention_backend import attention_backend, attention_backends
from moh_megatron.model.build import build_model, token_losses
from moh_megatron.model.single import init_single_process
from moh_megatron.monitor.flops import Flops, flops_per_token


def stack_pass(model: GPTModel, length: int, hidden: int) -> Callable[[], None]:
    """Forward + backward through the transformer block alone, one sequence."""
    generator = torch.Generator().manual_seed(0)
    x, d_out = (torch.randn(length, 1, hidden, generator=generator) for _ in range(2))
    x.requires_grad_()

    def run() -> None:
        model.zero_grad()
        x.grad = None
        rotary = model.rotary_pos_emb(length)
        out = cast(Tensor, model.decoder(hidden_states=x, attention_mask=None, rotary_pos_emb=rotary))
        out.backward(d_out)

    return run


def lone_stack_pass(config: Config) -> Callable[[], None]:
    """``stack_pass`` of a new model in a new process."""
    init_single_process(seed=0)
    return stack_pass(build_model(config).train(), config.train.sequence_length, config.model.hidden_size)


def full_model_pass(model: GPTModel, length: int, vocabulary: int) -> Callable[[], None]:
    """Forward + backward from tokens to the loss, one sequence."""
    tokens = torch.randint(0, vocabulary, (1, length + 1), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model.zero_grad()
        token_losses(model, tokens).mean().backward()

    return run


def twins(path: str, length: int, layers: int, backend: str = "auto") -> dict[str, Config]:
    """The configuration cut to ``layers``, with ``moh.backend`` as given, and its dense twin."""
    cut = [f"train.sequence_length={length}", f"model.num_layers={layers}", "train.precision=fp32"]
    cut.append(f"moh.backend={backend}")
    config = load_config(path, cut)
    return {"moh": config, "dense": replace(config, moh=replace(config.moh, enabled=False))}


def with_all_layers(stack: list[Turn], whole: list[Turn], depth: float) -> list[Turn]:
    """Extrapolate turns of the stack to a whole model that is ``depth`` times as deep.

    Embedding, head and loss are the same in both twins; their time is what the whole model takes beyond the stack.
    """
    medians = {name: statistics.median(turn[name] for turn in stack) for name in stack[0]}
    ends = statistics.median(turn[name] - medians[name] for turn in whole for name in turn)
    return [{name: ends + depth * seconds for name, seconds in turn.items()} for turn in stack]


def measure(path: str, length: int, layers: int, backend: str, turns: int, whole_turns: int) -> list[list[object]]:
    """Rows of the table for one length: the stack, the model as measured, and the model with all its layers."""
    configs, all_layers = twins(path, length, layers, backend), load_config(path).model.num_layers
    backend = attention_backend(configs["moh"], torch.device("cpu"))
    # The executed operations of the dense twin, too: its attention computes the scores again, as MoH attention does.
    flops = {
        name: flops_per_token(config, attention_backends(config, torch.device("cpu"))).executed
        for name, config in configs.items()
    }
    models = {name: build_model(config).train() for name, config in configs.items()}
    size = configs["dense"].model
    stack = take_turns({name: stack_pass(model, length, size.hidden_size) for name, model in models.items()}, turns)
    whole = take_turns(
        {name: full_model_pass(model, length, size.vocab_size) for name, model in models.items()}, whole_turns
    )

    peaks = {name: peak_megabytes(lone_stack_pass, config) for name, config in configs.items()}

    def row(part: str, timed: list[Turn], operations: Callable[[Flops], float], memory: str = "") -> list[object]:
        measured, predicted = ratios(timed, "moh", "dense"), operations(flops["moh"]) / operations(flops["dense"])
        realised = (1 - statistics.median(measured)) / (1 - predicted)
        return [length, part, backend, median_and_range(measured, 3), f"{predicted:.3f}", f"{realised:.0%}", memory]

    return [
        row(
            f"stack, {layers} layers",
            stack,
            lambda counts: counts.layers,
            f"{peaks['moh']:.0f} ({peaks['dense']:.0f})",
        ),
        row(f"whole, {layers} layers", whole, lambda counts: counts.total),
        row(
            f"whole, {all_layers} layers, extrapolated",
            with_all_layers(stack, whole, all_layers / layers),
            lambda counts: counts.layers * all_layers / layers + counts.head,
        ),
    ]


def attention(arguments: argparse.Namespace) -> None:
    """Print the table of `bench_step.py attention`."""
    init_single_process(seed=0)
    rows = []
    for length in tqdm(arguments.lengths, desc="bench", unit="length"):
        rows += measure(
            arguments.config, length, arguments.layers, arguments.backend, arguments.turns, arguments.whole_turns
        )
    print(circumstances())
    head = ["S", "part", "backend", "time over dense (range)", "predicted", "of the predicted saving", "MiB (dense's)"]
    print(markdown(head, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the model work of a training step.")
    parser.add_argument(
        "--monitor", nargs="+", choices=["on", "off"], help="time steps with all monitoring, without, or both in turns"
    )
    bench_engine.add_arguments(parser, turns=20)
    parser.add_argument("--interval", type=int, default=10, help="steps between logs, with --monitor")
    modes = parser.add_subparsers(metavar="MODE")
    mode = modes.add_parser("attention", help="MoH against its dense twin, and what counting operations predicts")
    mode.add_argument("--config", default="configs/pretrain/llm_s_moh50.yaml")
    mode.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    mode.add_argument("--layers", type=int, default=2)
    mode.add_argument("--backend", default="auto", help="moh.backend, as slots for heads chosen within KV groups")
    mode.add_argument("--turns", type=int, default=7, help="of the stack")
    mode.add_argument("--whole-turns", type=int, default=3, help="of the whole model")
    mode.set_defaults(measure=attention)
    mode = modes.add_parser("engine", help="the engine's step over a bare loop, and where its time goes")
    bench_engine.add_arguments(mode)
    mode.set_defaults(measure=bench_engine.measure)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.monitor:
        bench_monitor.measure(arguments)
    elif "measure" in arguments:
        arguments.measure(arguments)
    else:
        parser.error("name a mode, attention or engine, or --monitor on off")


if __name__ == "__main__":
    main()
