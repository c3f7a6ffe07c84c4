"""Gives the figures of a run their tags and hands them to a writer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.flops import FlopsPerToken
from moh_megatron.monitor.head_figures import HeadFigures, heat_map
from moh_megatron.monitor.writer import Scalar, Writer

COUNTS = ("dense_equivalent", "active_heads", "executed")
"""The three ways to count operations, as in ``flops.py``."""
_GIB = 2**30


@dataclass(frozen=True)
class IntervalStats:
    """Figures of one interval, beside losses and heads."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per step, of each part of a step and of the whole."""
    memory: Sequence[int] = ()
    """Bytes in use on each rank."""
    busy: Sequence[float] = ()
    """Seconds of data and forward pass on each rank."""
    parameter_norm: float | None = None
    router_grad_norm: float | None = None
    flops: FlopsPerToken | None = None
    """Operations per token."""
    bad_steps: int = 0
    """Skipped steps of the run so far."""
    restarts: int = 0


class MetricsLogger:
    """Names figures and hands them to a writer.

    Args:
        devices: number of devices that share the work.
        peak_tflops: the peak of one device; None leaves MFU out.
        head_scalars: whether each head has a scalar of its own.
    """

    def __init__(
        self, writer: Writer, devices: int = 1, peak_tflops: float | None = None, *, head_scalars: bool = False
    ) -> None:
        self._writer, self._devices, self._peak, self._head_scalars = writer, devices, peak_tflops, head_scalars

    def step(self, metrics: StepMetrics, loss: float) -> None:
        """Log the scalars of one step; ``loss`` is the total."""
        values = {
            "loss/total": loss,
            "loss/lm": metrics.lm_loss,
            "loss/perplexity": math.exp(min(metrics.lm_loss, 50.0)),
            "loss/balance": metrics.balance_loss,
            "optimizer/grad_norm": metrics.grad_norm,
            "optimizer/lr": metrics.lr,
            "throughput/tokens": metrics.tokens,
            "throughput/tokens_per_second": metrics.tokens_per_second,
        }
        self._writer.scalars(values, metrics.step)

    def interval(self, tokens_per_second: float, stats: IntervalStats, step: int) -> None:
        """Log the figures of an interval."""
        values = {f"time/{part}": seconds for part, seconds in stats.seconds.items()}
        values |= {"run/bad_steps": stats.bad_steps, "run/restarts": stats.restarts}
        if stats.memory:
            values["memory/largest_rank_gib"] = max(stats.memory) / _GIB
        if stats.busy and max(stats.busy) > 0:
            values["time/slowest_rank_over_median"] = slowest_over_median(stats.busy)[1]
        if stats.parameter_norm is not None:
            values["optimizer/parameter_norm"] = stats.parameter_norm
        if stats.router_grad_norm is not None:
            values["optimizer/router_grad_norm"] = stats.router_grad_norm
        if stats.flops is not None:
            rate = tokens_per_second / self._devices / 1e12
            for count in COUNTS:
                tflops = getattr(stats.flops, count).total * rate
                values[f"throughput/tflops_{count}"] = tflops
                if self._peak is not None:
                    values[f"throughput/mfu_{count}"] = tflops / self._peak
        self._writer.scalars(values, step)

    def head_load(self, load: Tensor, step: int) -> None:
        """Log ``load`` [L, N], the share of tokens that used each head: one scalar per head, grouped by layer."""
        values = {
            f"head_load/layer_{layer:02d}/head_{head:02d}": share
            for layer, heads in enumerate(load.tolist())
            for head, share in enumerate(heads)
        }
        self._writer.scalars(values, step)

    def heads(self, figures: HeadFigures, observed: Mapping[str, Sequence[float]], step: int) -> None:
        """Log the figures of the heads; ``observed``: what each layer showed, by name, NaN where there is none."""
        if self._head_scalars:
            self.head_load(figures.load, step)
        values: dict[str, float] = {}
        for layer in range(len(figures.routed)):
            figures_of_layer = {
                "dead_heads": figures.dead_share(layer) if figures.routed[layer] else math.nan,
                "load_entropy": figures.load_entropy[layer],
                "rank_imbalance": figures.rank_imbalance[layer],
                **{name: layers[layer] for name, layers in observed.items()},
            }
            values |= {
                f"routing_{name}/layer_{layer:02d}": value
                for name, value in figures_of_layer.items()
                if not math.isnan(value)
            }
        z_losses = [value for value in observed.get("z_loss", ()) if not math.isnan(value)]
        if z_losses:
            values["loss/z"] = sum(z_losses) / len(z_losses)
        self._writer.scalars(values, step)

    def head_maps(self, figures: HeadFigures, step: int) -> None:
        """Log the loads as an image, one row per layer, and the distribution of the routed heads' relative loads."""
        self._writer.image("routing_load/layers_by_heads", heat_map(figures.load, figures.groups), step)
        relative = [load for layer in figures.relative for load in layer]
        if relative:
            self._writer.histogram("routing_load/over_fair_load", relative, step)

    def validation(
        self, loss: float | None, sample: str, step: int, sources: Mapping[str, float] | None = None
    ) -> None:
        """Log a validation: its loss in nats per token (None without held-out text), a sample of text, and the losses
        of ``sources`` where there are several."""
        values = {f"validation/{name}": source_loss for name, source_loss in (sources or {}).items()}
        if loss is not None:
            values |= {"loss/validation": loss, "loss/validation_perplexity": math.exp(min(loss, 50.0))}
        self._writer.scalars(values, step)
        self._writer.text("sample", sample, step)
        self._writer.flush()

    def evaluation(self, scores: Mapping[str, float], step: int) -> None:
        """Log the scores of tasks for the checkpoint of ``step``."""
        self._writer.scalars({f"tasks/{task}": score for task, score in scores.items()}, step)

    def alarm(self, messages: Sequence[str], step: int) -> None:
        """Log the messages of alarms."""
        self._writer.text("alarms", "\n\n".join(messages), step)

    def flush(self) -> None:
        """Make the writer show everything that was logged."""
        self._writer.flush()

    def describe(self, texts: Mapping[str, str], step: int) -> None:
        """Log texts that describe the run, such as configuration and version."""
        for tag, text in texts.items():
            self._writer.text(tag, text, step)
        self._writer.flush()

    def finish(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """Log the settings of the run together with its results."""
        self._writer.hyperparameters(settings, results)

    def close(self) -> None:
        self._writer.close()


def slowest_over_median(busy: Sequence[float]) -> tuple[int, float]:
    """The rank with the longest time, and that time over the median."""
    slowest = max(range(len(busy)), key=busy.__getitem__)
    median = sorted(busy)[(len(busy) - 1) // 2]
    return slowest, busy[slowest] / median if median else math.inf
