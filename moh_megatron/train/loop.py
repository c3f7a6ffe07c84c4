"""Trains on one rank, step by step. Read this file from top to bottom."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moh_megatron.checkpoint.async_saver import AsyncSaver
from moh_megatron.checkpoint.save import Snapshot
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.batches import train_batches
from moh_megatron.io.errors import Fault
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.model.divergence import distilled_losses
from moh_megatron.moh.balancing import follow_schedule, update_biases
from moh_megatron.monitor.records import end_records, last_step, write_exit
from moh_megatron.parallel import groups
from moh_megatron.train.announce import announce
from moh_megatron.train.background_evaluation import BackgroundEvaluation
from moh_megatron.train.fault_tolerance.health import Health, earlier_losses
from moh_megatron.train.fault_tolerance.run_lock import RunLock
from moh_megatron.train.fault_tolerance.signals import EXIT_STOPPED, StopRequest
from moh_megatron.train.fault_tolerance.watchdog import GRACE_SECONDS, Watchdog
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.run_recorder import RunRecorder
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.session import Session, prepare_session
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.telemetry import Telemetry
from moh_megatron.train.validation import Validation, validate


@dataclass(frozen=True)
class Outcome:
    """How training ended: exit code, reason, last finished step."""

    code: int
    reason: str
    step: int | None
    """None where no step was finished."""


def train(config: Config, world: World, stop: StopRequest) -> Outcome:
    """Meet the other ranks, lock the run folder, and train until the end or until a rank is asked to stop.

    The state is saved in either case.
    """
    clock, run_dir = StartupClock(), Path(config.run.dir)

    def ended(reason: str, code: int) -> None:
        # The watchdog's thread calls this, while the main thread may still train.
        end_records()
        write_exit(run_dir, code, reason, last_step(run_dir / "metrics.jsonl"))

    watchdog = Watchdog(world, config.train.timeout_seconds, ended)
    with watchdog.watching():
        together = watchdog.all_ranks_up(lambda: stop.reason is not None)
        if world.rank == 0:
            # Held until this process ends. By now the other ranks can be told if another run holds it.
            RunLock(run_dir)
            (run_dir / "exit.json").unlink(missing_ok=True)
        if not together:
            reason = f"{stop.reason or 'a signal to another rank'}: nothing to save before the ranks have met"
            return Outcome(EXIT_STOPPED, reason, last_step(run_dir / "metrics.jsonl"))
        training = _Training(prepare_session(config, world, watchdog, clock), stop, watchdog, clock)
        try:
            outcome = training.train_steps()
        except BaseException:
            with contextlib.suppress(OSError, Fault):  # The first error is the one to report.
                training.close()
            raise
        training.close()
        return outcome


class _Training:
    """The steps of one run on this rank, with saves and validations where they are due."""

    def __init__(self, session: Session, stop: StopRequest, watchdog: Watchdog, clock: StartupClock) -> None:
        config = session.config
        self.session, self.config, self.stop, self.watchdog = session, config, stop, watchdog
        self.step = self.saved_step = session.start_step
        self.layers = moh_layers(session.engine.module)
        follow_schedule(self.layers, self.step)
        self.control_group = groups.control_group(timedelta(seconds=watchdog.timeout + GRACE_SECONDS))
        self.saver = AsyncSaver(checkpoint_dir(config), self.control_group)
        self.recorder = RunRecorder(session, self.layers, clock)
        self.telemetry = Telemetry(session, self.layers, self.control_group)
        self.timer = self.telemetry.timer
        self.evaluation: BackgroundEvaluation | None = None
        if session.first and config.evaluate.suite is not None:
            self.evaluation = BackgroundEvaluation(config, self.recorder.evaluation)
        metrics = Path(config.run.dir) / "metrics.jsonl"
        self.health = Health(
            config,
            session.train_dataset,
            self.control_group,
            earlier_losses(config, metrics, session.start_step, self.control_group),
            self.recorder.skipped_records,
        )

    def train_steps(self) -> Outcome:
        """Train from the current step to the last one, or until a rank is asked to stop."""
        train, checkpoint, evaluate = self.config.train, self.config.checkpoint, self.config.evaluate
        announce(self.session)
        self.telemetry.restart_clock()
        with self.recorder.training():
            if self.step and self._validation_due():
                self._validate()
                self.telemetry.restart_clock()
            for micro_batches in self.timer.iterate("data", self._batches()):
                self._train_step(micro_batches)
                self.step += 1
                with self.timer.part("save"):
                    self.saver.advance()
                self.recorder.step_done(self.step)
                stopping, validating = self._stop_agreed(), self._validation_due()
                evaluating = evaluate.suite is not None and _due(self.step, evaluate.interval)
                saving = _due(self.step, checkpoint.interval) or self.step == train.steps or stopping or evaluating
                if _due(self.step, self.config.monitor.log_interval) or validating or saving:
                    self._log()
                if saving:
                    self._save(wait=stopping)
                if self.evaluation and evaluating:
                    self.evaluation.request(self.step)
                if self.evaluation:
                    self.evaluation.advance()
                if stopping:
                    return Outcome(EXIT_STOPPED, f"{self.stop.reason or 'a signal to another rank'}: saved", self.step)
                if validating:
                    self._validate()
                if saving or validating:
                    self.telemetry.restart_clock()
            self._finish_saving()
        self.recorder.finish(self._validate(), self.step)
        if self.evaluation:
            self.evaluation.finish(self.watchdog.timeout / 2)
        return Outcome(0, "finished", self.step)

    def _batches(self) -> Iterator[list[torch.Tensor]]:
        """The micro-batches of each step that is left, tokens [B, S + 1]."""
        return train_batches(
            self.session.train_dataset,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.config.train.micro_batch_size,
            data_parallel_rank=groups.dp_group().rank(),
            data_parallel_size=groups.dp_group().size(),
            start_step=self.step,
            end_step=self.config.train.steps,
        )

    def _train_step(self, micro_batches: list[torch.Tensor]) -> None:
        engine, losses = self.session.engine, []
        self.telemetry.begin_step(self.step + 1)
        for tokens in micro_batches:
            with self.timer.part("forward"):
                loss, distillation_loss = self._losses(tokens.to(self.session.device))
            losses.append(loss.detach())
            loss = loss + distillation_loss
            if len(losses) == len(micro_batches) and self.health.skips_spike(losses):
                loss = loss * math.nan
            with self.timer.part("backward"):
                engine.backward(loss)
            self.watchdog.progress(self.step)
        self.telemetry.before_update()
        lr = learning_rate(self.config.optimizer, self.step, self.config.train.steps)
        with self.timer.part("optimizer"):
            grad_norm = engine.step(lr)
        routers = None
        if self.layers:
            routers = torch.stack([layer.statistics.drain(self.session.device) for layer in self.layers])
            if engine.applied:
                update_biases(self.layers, routers[:, :-1], groups.dp_group())
            follow_schedule(self.layers, self.step + 1)
        self.telemetry.end_step(self.step + 1, lr, losses, grad_norm, routers, skipped=not engine.applied)
        if engine.applied:
            self.health.applied()
        else:
            self._finish_saving()  # If this raises a Fault, it names the newest checkpoint.
            self.health.skipped(self.step + 1, losses)

    def _losses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of a micro-batch [B, S + 1], and the loss that distillation adds to it."""
        model, teacher, eos_token_id = self.session.engine.model, self.session.teacher, self.session.eos_token_id
        if teacher is None:
            loss = token_losses(model, tokens, eos_token_id).mean()
            return loss, loss.new_zeros(())
        losses, divergences = distilled_losses(model, teacher, tokens, eos_token_id)
        return losses.mean(), self.config.distillation.weight * divergences.mean()

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; the answer is the same on all."""
        self.stop.limit(self.config.train.max_seconds)
        requested = torch.tensor([self.stop.reason is not None], dtype=torch.int32)
        dist.all_reduce(requested, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(requested)

    def _validation_due(self) -> bool:
        # The end of the run has a validation of its own.
        return _due(self.step, self.config.train.eval_interval) and self.step < self.config.train.steps

    def _log(self) -> None:
        interval, stats = self.telemetry.flush()
        self.recorder.interval(interval, stats, self.step)
        for metrics in interval.steps:
            self.health.observe(metrics)

    def _save(self, *, wait: bool) -> None:
        """Save this step, unless it is saved; ``wait`` until it is on the disk."""
        session = self.session
        with self.watchdog.phase("save"), self.timer.part("save"):
            self.saver.finish()  # Host memory need not hold two copies of the state.
            if self.saved_step != self.step:
                in_use = self.evaluation.in_use if self.evaluation else frozenset[int]()
                snapshot = Snapshot.take(self.config, self.step, session.data.hash, session.hf_extras, session.engine)
                self.saver.begin(snapshot, in_use)
                self.saved_step = self.step
            if wait or not self.config.checkpoint.async_:
                self.saver.finish()

    def _finish_saving(self) -> None:
        with self.watchdog.phase("save"):
            self.saver.finish()

    def _validate(self) -> Validation:
        with self.watchdog.phase("validation"):
            validation = validate(self.session, self.step)
            self.recorder.validation(validation, self.step)
        return validation

    def close(self) -> None:
        """End the evaluation that still runs and close all files."""
        if self.evaluation:
            self.evaluation.stop()
        self.recorder.close()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
