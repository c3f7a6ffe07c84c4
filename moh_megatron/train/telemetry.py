"""What the training loop tells about itself: it is handed steps, and reduces, writes and warns once an interval."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.load import dump_config, mapping_of
from moh_megatron.model.build import attention_backends
from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.moh.observation import OBSERVED, RoutingObserver
from moh_megatron.monitor.accumulator import Interval, MetricsAccumulator
from moh_megatron.monitor.alarms import OVER, AlarmInputs, Alarms
from moh_megatron.monitor.device import memory_bytes, peak_tflops
from moh_megatron.monitor.flops import FlopsPerToken, flops_per_token
from moh_megatron.monitor.head_figures import HeadFigures, balance_excess, head_figures
from moh_megatron.monitor.metrics_logger import IntervalStats, MetricsLogger
from moh_megatron.monitor.prometheus import PrometheusFile
from moh_megatron.monitor.records import read_records
from moh_megatron.monitor.restarts import code_version, record_start
from moh_megatron.monitor.tensorboard import TensorBoard
from moh_megatron.monitor.timer import StepTimer
from moh_megatron.monitor.wandb import WeightsAndBiases
from moh_megatron.monitor.writer import Scalar, Writer, Writers
from moh_megatron.parallel import groups
from moh_megatron.train.setup import Session

logger = logging.getLogger(__name__)


class Telemetry:
    """Every rank has one; the first one writes.

    ``control``: a group of all ranks whose tensors lie on the host.
    """

    def __init__(
        self,
        session: Session,
        layers: Sequence[MoHSelfAttention],
        control: dist.ProcessGroup,
    ) -> None:
        config = session.config
        self._session, self._config, self._layers = session, config, layers
        self._control = control
        self.timer = StepTimer(session.device)
        self.metrics = MetricsAccumulator(
            groups.dp_group(),
            config.train.tokens_per_step,
            groups.tp_group() if config.parallel.sequence else None,
        )
        self._observer = RoutingObserver(layers)
        evened_by = "bias_update_rate" if config.moh.balancing == "bias" else "balance_coefficient"
        self._alarms = Alarms(config.monitor, balance_key=f"moh.{evened_by}")
        self._flops = lru_cache(maxsize=1)(self._count_flops)  # the heads stay when the schedule has run out
        self._router_norm: Tensor | None = None
        self._bad_steps, self._restarts = 0, 0
        layout = HeadLayout(config.model.num_attention_heads, config.model.query_groups, config.moh.head_layout)
        tensor = config.parallel.tensor
        self._local_heads = [layout.local_heads(rank, tensor) for rank in range(tensor)]
        self.board: MetricsLogger | None = None
        if session.first:
            self.board = self._open()

    def _open(self) -> MetricsLogger:
        session, config, monitor = self._session, self._config, self._config.monitor
        run_dir, start = Path(config.run.dir), session.start_step
        self._bad_steps = sum(record.get("skipped", False) for record in read_records(run_dir / "metrics.jsonl"))
        parallel = config.parallel
        with suppress(OSError):  # what counts lives may not cost one
            self._restarts = record_start(
                run_dir / "lives.jsonl",
                start,
                ranks=session.world.size,
                tensor=parallel.tensor,
                zero_stage=parallel.zero_stage,
                device=session.device.type,
            )
        makers: dict[str, Callable[[], Writer]] = {}
        if monitor.tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(run_dir / "tensorboard", start)
        if monitor.wandb_project is not None:
            project = monitor.wandb_project
            makers["Weights & Biases"] = lambda: WeightsAndBiases(project, run_dir)
        if monitor.prometheus is not None:
            file = Path(monitor.prometheus)
            makers["the file for Prometheus"] = lambda: PrometheusFile(file, run_dir.name)
        board = MetricsLogger(
            Writers(makers),
            session.world.size,
            monitor.peak_tflops or peak_tflops(session.device, config.train.precision),
        )
        board.describe({"config": f"```yaml\n{dump_config(config)}```", "version": code_version()}, start)
        return board

    def begin_step(self, step: int) -> None:
        """Step number ``step`` starts."""
        self._observer.on = step % self._config.monitor.log_interval == 0

    def before_update(self) -> None:
        """The gradients of the step are complete."""
        if self._observer.on:
            self._router_norm = self._session.engine.router_gradient_norm()

    def end_step(
        self, step: int, lr: float, losses: list[Tensor], grad_norm: Tensor, routers: Tensor | None, *, skipped: bool
    ) -> None:
        """As ``MetricsAccumulator.add``."""
        self.metrics.add(step, lr, losses, grad_norm, routers, skipped=skipped)
        self._bad_steps += skipped
        if self._observer.on:
            observed = self._observer.drain()
            self.metrics.observe(None if skipped else observed)
            self._observer.on = False

    def log(self, step: int) -> Interval:
        """All since the last call, reduced; shown and held against the alarms. Every rank calls it."""
        interval = self.metrics.flush()
        if not interval.steps:
            return interval
        steps = len(interval.steps)
        seconds = {part: spent / steps for part, spent in self.timer.drain().items()}
        busy, memory = self._of_each_rank(seconds)
        router_norm, self._router_norm = self._router_norm, None
        vitals = IntervalStats(
            seconds={**seconds, "step": interval.seconds_per_step},
            memory=memory,
            busy=busy,
            parameter_norm=float(self._session.engine.parameter_norm()),
            router_grad_norm=None if router_norm is None else float(router_norm),
            bad_steps=self._bad_steps,
            restarts=self._restarts,
            flops=self._flops(min(interval.steps[-1].step - 1, self._config.moh.activation_schedule_steps)),
        )
        if self.board:
            self._show(self.board, interval, vitals, step)
        return interval

    def _count_flops(self, step: int) -> FlopsPerToken:
        """Of a token, with the heads it used in the step after ``step``."""
        return flops_per_token(self._config, attention_backends(self._config, self._session.device, step), step=step)

    def _of_each_rank(self, seconds: Mapping[str, float]) -> tuple[list[float], list[int]]:
        own = [seconds.get("data", 0.0) + seconds.get("forward", 0.0), float(memory_bytes(self._session.device))]
        mine = torch.tensor(own, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self._control.size())]
        dist.all_gather(everyone, mine, group=self._control)
        return [float(each[0]) for each in everyone], [int(each[1]) for each in everyone]

    def _show(self, board: MetricsLogger, interval: Interval, vitals: IntervalStats, step: int) -> None:
        for metrics in interval.steps:
            board.step(metrics, metrics.lm_loss + self._config.moh.balance_weight * metrics.balance_loss)
        newest = interval.steps[-1]
        board.interval(newest.tokens_per_second, vitals, step)
        observed: dict[str, list[float]] = {}
        if interval.observed is not None:
            observed = dict(zip(OBSERVED, interval.observed.t().tolist(), strict=True))
        figures = None
        if interval.head_load is not None:
            figures = self._figures(interval.head_load)
            board.heads(figures, observed, step)
            every = self._config.monitor.image_interval
            if every and any(metrics.step % every == 0 for metrics in interval.steps):
                board.head_maps(figures, step)
        excess = None
        applied = [metrics.balance_loss for metrics in interval.steps if not metrics.skipped]
        if figures is not None and applied:
            excess = balance_excess(
                math.fsum(applied) / len(applied), self._heads, self._top_k, self._config.moh.balance_loss
            )
        messages = self._alarms.check(AlarmInputs(newest.tokens_per_second, figures, observed, excess, vitals.busy))
        for message in messages:
            logger.log(logging.INFO if message.startswith(OVER) else logging.WARNING, f"step {step}: {message}")
        if messages:
            board.alarm(messages, step)
        board.flush()

    @property
    def _heads(self) -> list:
        return [layer.router.heads for layer in self._layers]

    @property
    def _top_k(self) -> list[int]:
        return [layer.router.top_k for layer in self._layers]

    def _figures(self, load: Tensor) -> HeadFigures:
        return head_figures(load, self._heads, self._top_k, self._local_heads)

    def finish(self, results: Mapping[str, float | None]) -> None:
        """The run has ended with these results."""
        if self.board:
            settings: dict[str, Scalar] = {}
            for section, values in mapping_of(self._config).items():
                for key, value in values.items():
                    settings[f"{section}.{key}"] = value if isinstance(value, Scalar) else json.dumps(value)
            self.board.finish(settings, {name: value for name, value in results.items() if value is not None})

    def close(self) -> None:
        if self.board:
            self.board.close()
