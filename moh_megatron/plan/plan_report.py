"""Formats a plan as text and as a mapping for JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from moh_megatron.config.head_layout import LARGEST_IMBALANCE, HeadLayout
from moh_megatron.config.schema import Config
from moh_megatron.plan.advice import Remedy
from moh_megatron.plan.run_plan import Plan, as_ranges

GIB = 2**30
_TIGHT = 0.9
"""A plan warns if it needs more than this share of the device's memory."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether a plan fits a device, and the settings that would save memory."""

    gpu_memory_bytes: int
    needed_bytes: int
    remedies: tuple[Remedy, ...]

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.gpu_memory_bytes


def as_mapping(plan: Plan, fit: Fit | None) -> dict[str, Any]:
    """Every number of the report as a nested mapping: bytes, operations and counts."""
    found = dataclasses.asdict(plan)
    found["parameters"]["total"] = plan.parameters.total
    found["device_bytes"] = plan.device_bytes
    found["activations"]["total"] = plan.activations.total
    for kind, flops in dataclasses.asdict(plan.flops).items():
        found["flops"][kind]["total"] = flops["layers"] + flops["head"]
    found["fit"] = None if fit is None else {**dataclasses.asdict(fit), "fits": fit.fits}
    return found


def as_text(config: Config, plan: Plan, fit: Fit | None) -> str:
    """The report as tables of at most 120 columns."""
    parts = [_head(config, plan), _memory(plan), _heads(config, plan), _flops(plan), _communication(plan)]
    if fit is not None:
        parts.append("\n".join(_verdict(config, fit)))
    return "\n\n".join(parts)


def _head(config: Config, plan: Plan) -> str:
    parallel, train = config.parallel, config.train
    sequence = " with sequence parallelism" if parallel.sequence else ""
    return (
        f"{plan.world_size} ranks: TP {plan.tensor}{sequence} x DP {plan.data}, ZeRO {parallel.zero_stage}, "
        f"{train.precision}, recompute {train.recompute}\n"
        f"{plan.parameters.total:,} parameters, {plan.parameters.router:,} of them in routers\n"
        f"{plan.steps:,} steps of {plan.tokens_per_step:,} tokens: {train.global_batch_size:,} sequences of "
        f"{train.sequence_length:,}, {plan.accumulation_steps:,} micro-batches of {train.micro_batch_size} on each rank"
    )


def _memory(plan: Plan) -> str:
    states, kept = plan.states, plan.activations
    rows = [
        ["parameters", _gib(states.parameters), "counted"],
        ["gradients", _gib(states.gradients), "counted"],
        ["optimizer state", _gib(states.optimizer), "counted"],
        ["communication buffers", _gib(states.buffers), "at most"],
        ["activations of the layers", _gib(kept.layers + kept.recomputed), "estimated"],
        ["logits and loss", _gib(kept.head), "estimated"],
        ["total", _gib(plan.device_bytes), ""],
    ]
    if states.teacher:
        rows.insert(-1, ["teacher of distillation", _gib(states.teacher), "if of this model's size"])
    if states.host_optimizer:
        rows.append(["in host memory", _gib(states.host_gradients + states.host_optimizer), "ZeRO-Offload"])
    return _table(["memory of the busiest rank", "GiB", ""], rows)


def _heads(config: Config, plan: Plan) -> str:
    rows = [
        [
            f"layers {as_ranges(balance.layers)}",
            f"{balance.active} of {balance.heads}, {balance.shared} shared",
            ", ".join(f"{load:.2f}" for load in balance.load),
            f"{balance.imbalance:.2f}",
        ]
        for balance in plan.head_balance
    ]
    title = f"heads, {config.moh.head_layout}" if config.moh.enabled else "heads"
    table = _table([title, "active", "a token on each rank", "max / mean"], rows)
    layout = HeadLayout(config.model.num_attention_heads, config.model.query_groups)
    if max(balance.imbalance for balance in plan.head_balance) > LARGEST_IMBALANCE:
        table += "\n" + textwrap.fill(f"warning: uneven; {layout.remedy}", 120)
    if all(balance.routing_groups > 1 for balance in plan.head_balance):
        table += f"\n{layout.evenness}"
    return table


def _flops(plan: Plan) -> str:
    flops = plan.flops
    rows = [
        [name, f"{count.total / 1e9:,.3f}", f"{count.total / flops.dense_equivalent.total:.3f}"]
        for name, count in (
            ("dense-equivalent", flops.dense_equivalent),
            ("active heads", flops.active_heads),
            (f"executed, attention {plan.backend}", flops.executed),
        )
    ]
    return _table(["operations of a token, forward and backward", "GFLOP", "of dense"], rows)


def _communication(plan: Plan) -> str:
    if not plan.communication:
        return "communication: none"
    names = {"tensor": f"TP {plan.tensor}", "data": f"DP {plan.data}"}
    rows = [
        [names[traffic.group], traffic.what, traffic.operation, f"{traffic.calls:,}", _gib(traffic.sent_bytes)]
        for traffic in plan.communication
    ]
    return _table(["sent by a rank in a step", "", "", "tensors", "GiB"], rows)


def _verdict(config: Config, fit: Fit) -> Iterator[str]:
    memory, needed = fit.gpu_memory_bytes, fit.needed_bytes
    if fit.fits:
        yield f"It fits {_gib(memory)} GiB; {_gib(memory - needed)} GiB are left."
        if needed > _TIGHT * memory:
            yield "That is little: the CUDA context, fragments and what lives inside one operation are not counted."
        return
    yield f"It does not fit {_gib(memory)} GiB: {_gib(needed - memory)} GiB are missing."
    if not fit.remedies:
        yield "No single setting saves memory; use more ranks or a smaller model."
        return
    for position, remedy in enumerate(fit.remedies):
        section, _, name = remedy.key.partition(".")
        current = getattr(getattr(config, section), name)
        result = "fits" if remedy.device_bytes <= memory else "still too much"
        yield (
            f"  {'helps most: ' if position == 0 else '            '}{remedy.key}={_shown(remedy.value)} "
            f"(now {_shown(current)}) saves {_gib(needed - remedy.device_bytes)} GiB: "
            f"{_gib(remedy.device_bytes)}, {result}"
        )
    if fit.remedies[0].device_bytes > memory:
        yield "No single one is enough: combine them, or use more ranks."


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(size: int) -> str:
    return f"{size / GIB:,.3f}" if size < GIB else f"{size / GIB:,.2f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A table of padded columns; cells that start with a digit are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if cell[:1].isdigit() or (cell == "GiB") else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [head, *rows]))
