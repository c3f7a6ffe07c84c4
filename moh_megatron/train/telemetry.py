"""Measures the training steps on every rank and reduces the figures over all ranks once an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.model.attention_backend import attention_backends
from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.moh.observation import RoutingObserver
from moh_megatron.monitor.accumulator import Interval, MetricsAccumulator
from moh_megatron.monitor.device import memory_bytes
from moh_megatron.monitor.flops import FlopsPerToken, flops_per_token
from moh_megatron.monitor.metrics_logger import IntervalStats
from moh_megatron.monitor.timer import StepTimer
from moh_megatron.parallel import groups
from moh_megatron.train.session import Session


class Telemetry:
    """The measurements of one rank; every rank has one and calls ``flush`` at the same steps.

    Args:
        layers: the MoH layers of this rank's model; empty in a dense model.
        control_group: all ranks, with tensors in host memory.
    """

    def __init__(self, session: Session, layers: Sequence[MoHSelfAttention], control_group: dist.ProcessGroup) -> None:
        config = session.config
        self._config, self._engine, self._device = config, session.engine, session.device
        self._control_group = control_group
        self._metrics = MetricsAccumulator(
            groups.dp_group(),
            config.train.tokens_per_step,
            groups.tp_group() if config.parallel.sequence else None,
        )
        self._observer = RoutingObserver(layers)
        self._router_norm: Tensor | None = None
        # Once the activation schedule has ended, the number of active heads stays, and so does the count.
        self._flops = lru_cache(maxsize=1)(self._count_flops)
        self.timer = StepTimer(session.device)
        """Measures the parts of a step."""

    def begin_step(self, step: int) -> None:
        """Call this before the forward passes of step number ``step``."""
        self._observer.on = step % self._config.monitor.log_interval == 0

    def before_update(self) -> None:
        """Call this when the gradients of the step are complete."""
        if self._observer.on:
            self._router_norm = self._engine.router_gradient_norm()

    def end_step(
        self, step: int, lr: float, losses: list[Tensor], grad_norm: Tensor, routers: Tensor | None, *, skipped: bool
    ) -> None:
        """Add a finished step; the arguments are those of ``MetricsAccumulator.add``."""
        self._metrics.add(step, lr, losses, grad_norm, routers, skipped=skipped)
        if self._observer.on:
            observed = self._observer.drain()
            self._metrics.observe(None if skipped else observed)
            self._observer.on = False

    def restart_clock(self) -> None:
        """Leave the time since the last ``flush`` out of the next rate: it went to a save or a validation."""
        self._metrics.restart_clock()

    def flush(self) -> tuple[Interval, IntervalStats]:
        """Everything since the last call, reduced over all ranks; empty where no step was added."""
        interval = self._metrics.flush()
        if not interval.steps:
            return interval, IntervalStats()
        seconds = {part: spent / len(interval.steps) for part, spent in self.timer.drain().items()}
        busy, memory = self._gather_load(seconds)
        router_norm, self._router_norm = self._router_norm, None
        stats = IntervalStats(
            seconds={**seconds, "step": interval.seconds_per_step},
            memory=memory,
            busy=busy,
            parameter_norm=float(self._engine.parameter_norm()),
            router_grad_norm=None if router_norm is None else float(router_norm),
            flops=self._flops(min(interval.steps[-1].step - 1, self._config.moh.activation_schedule_steps)),
        )
        return interval, stats

    def _count_flops(self, step: int) -> FlopsPerToken:
        """Operations per token with the heads that are active in the step after ``step``."""
        return flops_per_token(self._config, attention_backends(self._config, self._device, step), step=step)

    def _gather_load(self, seconds: Mapping[str, float]) -> tuple[list[float], list[int]]:
        """Seconds of data and forward pass, and bytes in use, of every rank."""
        busy = seconds.get("data", 0.0) + seconds.get("forward", 0.0)
        own = torch.tensor([busy, float(memory_bytes(self._device))], dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self._control_group.size())]
        dist.all_gather(gathered, own, group=self._control_group)
        return [float(load[0]) for load in gathered], [int(load[1]) for load in gathered]
