"""Writes and shows what a run does: the records of its folder, figures, alarms, validations, progress and summary."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.load import dump_config, mapping_of
from moh_megatron.io.console import progress_bar
from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.moh.observation import OBSERVED
from moh_megatron.monitor.accumulator import Interval, StepMetrics
from moh_megatron.monitor.alarms import RESOLVED, AlarmInputs, Alarms
from moh_megatron.monitor.device import peak_tflops
from moh_megatron.monitor.head_figures import HeadFigures, balance_excess, head_figures
from moh_megatron.monitor.metrics_logger import IntervalStats, MetricsLogger
from moh_megatron.monitor.profile import profiled
from moh_megatron.monitor.prometheus import PrometheusFile
from moh_megatron.monitor.records import StepRecords, read_records, write_head_load
from moh_megatron.monitor.restarts import code_version, record_start
from moh_megatron.monitor.tensorboard import TensorBoard
from moh_megatron.monitor.wandb import WeightsAndBiases
from moh_megatron.monitor.writer import Scalar, Writer, Writers
from moh_megatron.train.session import Session
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.summary import write_summary
from moh_megatron.train.validation import Validation

logger = logging.getLogger(__name__)


class RunRecorder:
    """The first rank writes and shows; on every other rank the methods do nothing. None of them waits for a rank.

    Args:
        layers: the MoH layers of the model; empty in a dense model.
        clock: measures the start of the run; its last part ends with the first step.
    """

    def __init__(self, session: Session, layers: Sequence[MoHSelfAttention], clock: StartupClock) -> None:
        self._session, self._config, self._layers, self._clock = session, session.config, layers, clock
        self.skipped_records: StepRecords | None = None
        """skipped.jsonl, on the first rank."""
        self._seconds = 0.0
        self._train_loss: float | None = None
        if session.first:
            self._open()

    def _open(self) -> None:
        session, config = self._session, self._config
        run_dir, start = Path(config.run.dir), session.start_step
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / ".config.yaml").write_text(dump_config(config), encoding="utf-8")
        (run_dir / ".config.yaml").replace(run_dir / "config.yaml")
        self._step_records = StepRecords(run_dir / "metrics.jsonl", start)
        # The checkpoint of a step is saved before its validation: a validation that was cut short is done again.
        self._validation_records = StepRecords(run_dir / "validation.jsonl", start - 1)
        self.skipped_records = StepRecords(run_dir / "skipped.jsonl", start)
        self._bad_steps = sum(record.get("skipped", False) for record in read_records(run_dir / "metrics.jsonl"))
        self._restarts = 0
        with suppress(OSError):  # A count of restarts is not worth ending the run for.
            self._restarts = record_start(
                run_dir,
                start,
                ranks=session.world.size,
                tensor=config.parallel.tensor,
                zero_stage=config.parallel.zero_stage,
                device=session.device.type,
            )
        self._metrics_logger = self._open_metrics_logger(run_dir, start)
        key = "bias_update_rate" if config.moh.balancing == "bias" else "balance_coefficient"
        self._alarms = Alarms(
            config.monitor,
            balance_key=f"moh.{key}",
            accelerator=session.device.type != "cpu",
            mfu=(config.monitor.peak_tflops or peak_tflops(session.device, config.train.precision)) is not None,
        )
        layout = HeadLayout(config.model.num_attention_heads, config.model.query_groups, config.moh.head_layout)
        tensor = config.parallel.tensor
        self._local_heads = [layout.local_heads(rank, tensor) for rank in range(tensor)]

    def _open_metrics_logger(self, run_dir: Path, start: int) -> MetricsLogger:
        session, config, monitor = self._session, self._config, self._config.monitor
        makers: dict[str, Callable[[], Writer]] = {}
        if monitor.tensorboard:
            makers["TensorBoard"] = lambda: TensorBoard(run_dir, start)
        if monitor.wandb_project is not None:
            project = monitor.wandb_project
            makers["Weights & Biases"] = lambda: WeightsAndBiases(project, run_dir)
        if monitor.prometheus is not None:
            file = Path(monitor.prometheus)
            makers["the file for Prometheus"] = lambda: PrometheusFile(file, run_dir.resolve().name)
        metrics_logger = MetricsLogger(
            Writers(makers),
            session.world.size,
            monitor.peak_tflops or peak_tflops(session.device, config.train.precision),
            head_scalars=monitor.head_scalars,
        )
        metrics_logger.describe({"config": f"```yaml\n{dump_config(config)}```", "version": code_version()}, start)
        return metrics_logger

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show a progress bar, trace a few steps if asked to, and count the seconds of the block that trains."""
        if not self._session.first:
            yield
            return
        config, started = self._config, time.monotonic()
        trace_folder = Path(config.run.dir) / "profile" if config.monitor.profile else None
        bar = progress_bar("train", config.train.steps, "step", initial=self._session.start_step)
        with bar as self._bar, profiled(trace_folder) as self._profile_step:
            yield
            self._seconds = time.monotonic() - started

    def step_done(self, step: int) -> None:
        """Step number ``step`` is done."""
        if not self._session.first:
            return
        self._bar.update()
        self._profile_step()
        if step == self._session.start_step + 1:
            self._clock.mark("first step")
            logger.info(str(self._clock))

    def interval(self, interval: Interval, stats: IntervalStats, step: int) -> None:
        """Write, show and check what ``Telemetry.flush`` returned after ``step``."""
        if not self._session.first or not interval.steps:
            return
        self._bad_steps += sum(metrics.skipped for metrics in interval.steps)
        self._show(interval, dataclasses.replace(stats, bad_steps=self._bad_steps, restarts=self._restarts), step)
        newest = interval.steps[-1]
        records = ({**dataclasses.asdict(metrics), "loss": self._total_loss(metrics)} for metrics in interval.steps)
        self._step_records.write(records)
        if interval.head_load is not None:
            write_head_load(Path(self._config.run.dir), newest.step, interval.head_load.tolist())
        applied = [metrics.lm_loss for metrics in interval.steps if not metrics.skipped]
        self._train_loss = applied[-1] if applied else None
        self._bar.set_postfix(loss=f"{newest.lm_loss:.3f}", tok_s=f"{newest.tokens_per_second:,.0f}", refresh=False)

    def _total_loss(self, metrics: StepMetrics) -> float:
        return metrics.lm_loss + self._config.moh.balance_weight * metrics.balance_loss

    def _show(self, interval: Interval, stats: IntervalStats, step: int) -> None:
        """Hand the figures to the writers, and hold them against the alarms."""
        metrics_logger, newest = self._metrics_logger, interval.steps[-1]
        for metrics in interval.steps:
            metrics_logger.step(metrics, self._total_loss(metrics))
        metrics_logger.interval(newest.tokens_per_second, stats, step)
        observed: dict[str, list[float]] = {}
        if interval.observed is not None:
            observed = dict(zip(OBSERVED, interval.observed.t().tolist(), strict=True))
        figures, excess = self._head_figures(interval)
        if figures is not None:
            metrics_logger.heads(figures, observed, step)
            image_interval = self._config.monitor.image_interval
            if image_interval and any(metrics.step % image_interval == 0 for metrics in interval.steps):
                metrics_logger.head_maps(figures, step)
        steps = sum(not metrics.skipped for metrics in interval.steps)
        inputs = AlarmInputs(newest.tokens_per_second, steps, figures, observed, excess, stats.busy)
        messages = self._alarms.check(inputs)
        for message in messages:
            logger.log(logging.INFO if message.startswith(RESOLVED) else logging.WARNING, f"step {step}: {message}")
        if messages:
            metrics_logger.alarm(messages, step)
        metrics_logger.flush()

    def _head_figures(self, interval: Interval) -> tuple[HeadFigures | None, float | None]:
        """The figures of the heads, and the excess of the balance loss where a step was not skipped."""
        if interval.head_load is None:
            return None, None
        heads, top_k = [layer.router.heads for layer in self._layers], [layer.router.top_k for layer in self._layers]
        figures = head_figures(interval.head_load, heads, top_k, self._local_heads)
        losses = [metrics.balance_loss for metrics in interval.steps if not metrics.skipped]
        if not losses:
            return figures, None
        mean = math.fsum(losses) / len(losses)
        return figures, balance_excess(mean, heads, top_k, self._config.moh.balance_loss)

    def validation(self, validation: Validation, step: int) -> None:
        """Write and show the validation after ``step``."""
        if not self._session.first:
            return
        loss, sources, sample = validation.loss, validation.source_losses, validation.sample
        if loss is not None:
            logger.info(f"step {step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.1f}")
        if len(sources) > 1:
            logger.info("  " + ", ".join(f"{name} {source_loss:.4f}" for name, source_loss in sources.items()))
        logger.info(f"  | {sample}")
        record = {"sources": sources} if len(sources) > 1 else {}
        self._validation_records.write([{"step": step, "loss": loss, **record, "sample": sample}])
        self._metrics_logger.validation(loss, sample, step, sources if len(sources) > 1 else None)

    def evaluation(self, scores: Mapping[str, float], step: int) -> None:
        """Show the scores of tasks for the checkpoint of ``step``."""
        if self._session.first:
            self._metrics_logger.evaluation(scores, step)

    def finish(self, validation: Validation, step: int) -> None:
        """The run has ended at ``step`` with this validation: write the summary and the hyperparameters."""
        if not self._session.first:
            return
        write_summary(self._session, step, self._seconds, self._clock, self._train_loss, validation)
        settings: dict[str, Scalar] = {}
        for section, values in mapping_of(self._config).items():
            for key, value in values.items():
                settings[f"{section}.{key}"] = value if isinstance(value, Scalar) else json.dumps(value)
        results = {"summary/validation_loss": validation.loss, "summary/train_loss": self._train_loss}
        self._metrics_logger.finish(settings, {name: loss for name, loss in results.items() if loss is not None})

    def close(self) -> None:
        """Close all files."""
        if self._session.first:
            self._metrics_logger.close()
            for records in (self._step_records, self._validation_records, self.skipped_records):
                if records is not None:
                    records.close()
