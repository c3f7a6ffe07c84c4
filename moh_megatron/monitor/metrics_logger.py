"""Which figures a run shows, and under which tags."""

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
"""The three ways operations are counted, as in ``flops.py``."""
_GIB = 2**30


@dataclass(frozen=True)
class IntervalStats:
    """Of one interval, beside losses and heads; seconds are those of a step."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Sequence[int] = ()
    """Bytes in use, of each rank."""
    busy: Sequence[float] = ()
    """Seconds of data and forward pass, of each rank."""
    parameter_norm: float | None = None
    router_grad_norm: float | None = None
    flops: FlopsPerToken | None = None
    """Operations of a token."""
    bad_steps: int = 0
    """Of the run so far."""
    restarts: int = 0


class MetricsLogger:
    """Names figures and hands them to a writer.

    Args:
        devices: that share the work.
        peak_tflops: of one of them; None leaves MFU out.
    """

    def __init__(self, writer: Writer, devices: int = 1, peak_tflops: float | None = None) -> None:
        self._writer, self._devices, self._peak = writer, devices, peak_tflops

    def step(self, metrics: StepMetrics, loss: float) -> None:
        """Scalars of one step; ``loss`` is the total."""
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

    def interval(self, tokens_per_second: float, vitals: IntervalStats, step: int) -> None:
        """What is known once an interval."""
        values = {f"time/{part}": seconds for part, seconds in vitals.seconds.items()}
        values |= {"health/bad_steps": vitals.bad_steps, "health/restarts": vitals.restarts}
        if vitals.memory:
            values["memory/largest_rank_gib"] = max(vitals.memory) / _GIB
        if vitals.busy and max(vitals.busy) > 0:
            values["time/slowest_rank_over_median"] = slowest_over_median(vitals.busy)[1]
        if vitals.parameter_norm is not None:
            values["optimizer/parameter_norm"] = vitals.parameter_norm
        if vitals.router_grad_norm is not None:
            values["optimizer/router_grad_norm"] = vitals.router_grad_norm
        if vitals.flops is not None:
            rate = tokens_per_second / self._devices / 1e12
            for count in COUNTS:
                tflops = getattr(vitals.flops, count).total * rate
                values[f"throughput/tflops_{count}"] = tflops
                if self._peak is not None:
                    values[f"throughput/mfu_{count}"] = tflops / self._peak
        self._writer.scalars(values, step)

    def head_load(self, load: Tensor, step: int) -> None:
        """``load`` [L, N]: share of tokens that used each head; a scalar for each, grouped by layer."""
        values = {
            f"head_load/layer_{layer:02d}/head_{head:02d}": share
            for layer, heads in enumerate(load.tolist())
            for head, share in enumerate(heads)
        }
        self._writer.scalars(values, step)

    def heads(self, figures: HeadFigures, observed: Mapping[str, Sequence[float]], step: int) -> None:
        """Loads and what follows from them; ``observed``: of each layer, by name, NaN where there is none."""
        self.head_load(figures.load, step)
        values: dict[str, float] = {}
        for layer in range(len(figures.routed)):
            of_layer = {
                "dead_heads": figures.dead_share(layer) if figures.routed[layer] else math.nan,
                "load_entropy": figures.load_entropy[layer],
                "rank_imbalance": figures.rank_imbalance[layer],
                **{name: each[layer] for name, each in observed.items()},
            }
            values |= {
                f"routing_{name}/layer_{layer:02d}": value for name, value in of_layer.items() if not math.isnan(value)
            }
        z = [value for value in observed.get("z_loss", ()) if not math.isnan(value)]
        if z:
            values["loss/z"] = sum(z) / len(z)
        self._writer.scalars(values, step)

    def head_maps(self, figures: HeadFigures, step: int) -> None:
        """Loads as a picture, layers down and heads across, and the spread of the routed heads' relative loads."""
        self._writer.image("head_load/layers_by_heads", heat_map(figures.load), step)
        relative = [each for layer in figures.relative for each in layer]
        if relative:
            self._writer.histogram("head_load/over_fair_load", relative, step)

    def validation(
        self, loss: float | None, sample: str, step: int, sources: Mapping[str, float] | None = None
    ) -> None:
        """Validation loss (nats a token; None without held-out text), those of ``sources`` where there are several, and
        what the model writes."""
        values = {f"validation/{name}": each for name, each in (sources or {}).items()}
        if loss is not None:
            values |= {"loss/validation": loss, "loss/validation_perplexity": math.exp(min(loss, 50.0))}
        self._writer.scalars(values, step)
        self._writer.text("sample", sample, step)
        self._writer.flush()

    def evaluation(self, scores: Mapping[str, float], step: int) -> None:
        """What tasks gave for the checkpoint of ``step``."""
        self._writer.scalars({f"evaluation/{task}": score for task, score in scores.items()}, step)

    def alarm(self, messages: Sequence[str], step: int) -> None:
        self._writer.text("alarms", "\n\n".join(messages), step)

    def flush(self) -> None:
        """Show what was written."""
        self._writer.flush()

    def describe(self, texts: Mapping[str, str], step: int) -> None:
        """What the run is, in words: configuration, version."""
        for tag, text in texts.items():
            self._writer.text(tag, text, step)
        self._writer.flush()

    def finish(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """What the run was, beside what came of it."""
        self._writer.hyperparameters(settings, results)

    def close(self) -> None:
        self._writer.close()


def slowest_over_median(busy: Sequence[float]) -> tuple[int, float]:
    """The rank that was busy longest, and how many times the median that is."""
    slowest = max(range(len(busy)), key=busy.__getitem__)
    median = sorted(busy)[(len(busy) - 1) // 2]
    return slowest, busy[slowest] / median if median else math.inf
