"""The training loop. Read it top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from moh_megatron.checkpoint.async_saver import Saver
from moh_megatron.checkpoint.save import Snapshot
from moh_megatron.config.count import parameter_count
from moh_megatron.config.load import dump_config
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import mean_by_shares
from moh_megatron.data.batches import train_batches, validation_batches
from moh_megatron.io.errors import Fault
from moh_megatron.model.build import attention_backend, attention_warning, moh_layers, token_losses
from moh_megatron.model.divergence import distilled_losses
from moh_megatron.moh.balancing import follow_schedule, update_biases
from moh_megatron.monitor.accumulator import Interval
from moh_megatron.monitor.profile import profiled
from moh_megatron.monitor.records import StepRecords, last_step, write_exit
from moh_megatron.parallel import groups
from moh_megatron.train.announce import head_report
from moh_megatron.train.background_evaluation import EVALUATE, BackgroundEvaluation
from moh_megatron.train.fault_tolerance.health import Health, earlier_losses
from moh_megatron.train.fault_tolerance.run_lock import RunLock
from moh_megatron.train.fault_tolerance.signals import EXIT_STOPPED, StopRequest
from moh_megatron.train.fault_tolerance.watchdog import GRACE_SECONDS, Watchdog
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.setup import Session, prepare_session
from moh_megatron.train.startup import StartupClock
from moh_megatron.train.summary import summarise
from moh_megatron.train.telemetry import Telemetry
from moh_megatron.train.validation import sample_text, validation_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How training ended: exit code, reason, last finished step."""

    code: int
    reason: str
    step: int | None
    """None: there is none."""


def train(config: Config, world: World, stop: StopRequest) -> Outcome:
    """Train to the end, or until ``stop`` asks for an end on any rank; the state is saved either way."""
    clock, run_dir = StartupClock(), Path(config.run.dir)

    def ended(reason: str, code: int) -> None:
        write_exit(run_dir, code, reason, last_step(run_dir / "metrics.jsonl"))

    watchdog = Watchdog(world, config.train.timeout_seconds, ended)
    with watchdog.watching():
        together = watchdog.all_ranks_up(lambda: stop.reason is not None)
        if world.rank == 0:
            RunLock(run_dir)  # until this process ends; now that the others can be told if another run has it
            (run_dir / "exit.json").unlink(missing_ok=True)
        if not together:
            reason = f"{stop.reason or 'a signal to another rank'}: nothing to save before the ranks have met"
            return Outcome(EXIT_STOPPED, reason, last_step(run_dir / "metrics.jsonl"))
        training = _Training(prepare_session(config, world, watchdog, clock), stop, watchdog, clock)
        try:
            outcome = training.run()
        except BaseException:
            with contextlib.suppress(OSError, Fault):  # what went wrong first is what is told
                training.close()
            raise
        training.close()
        return outcome


class _Training:
    def __init__(self, session: Session, stop: StopRequest, watchdog: Watchdog, clock: StartupClock) -> None:
        config = session.config
        self.session, self.config, self.stop = session, config, stop
        self.watchdog, self.clock = watchdog, clock
        self.steps = config.train.steps
        self.run_dir = Path(config.run.dir)
        self.saved_step = session.start_step
        self.step = session.start_step
        self.seconds = 0.0
        self.layers = moh_layers(session.engine.module)
        follow_schedule(self.layers, self.step)
        self.control_group = groups.control_group(timedelta(seconds=watchdog.timeout + GRACE_SECONDS))
        self.saver = Saver(checkpoint_dir(config), self.control_group)
        self.last: Interval | None = None
        self.records: StepRecords | None = None
        self.validations: StepRecords | None = None
        self.skips: StepRecords | None = None
        if session.first:
            self._open_run_folder()
        self.telemetry = Telemetry(session, self.layers, self.control_group)
        self.metrics, self.timer, self.board = self.telemetry.metrics, self.telemetry.timer, self.telemetry.board
        self.evaluation: BackgroundEvaluation | None = None
        if self.board and config.evaluate.suite is not None:
            self.evaluation = BackgroundEvaluation(config, EVALUATE, self.board.evaluation)
        self.health = Health(
            config,
            session.train_dataset,
            self.control_group,
            earlier_losses(config, self.run_dir / "metrics.jsonl", session.start_step, self.control_group),
            self.skips,
        )

    def _open_run_folder(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / ".config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        (self.run_dir / ".config.yaml").replace(self.run_dir / "config.yaml")
        start = self.session.start_step
        self.records = StepRecords(self.run_dir / "metrics.jsonl", start)
        # The checkpoint of a step is saved before its validation: what was cut short is done again.
        self.validations = StepRecords(self.run_dir / "validation.jsonl", start - 1)
        self.skips = StepRecords(self.run_dir / "skipped.jsonl", start)

    def run(self) -> Outcome:
        train, checkpoint = self.config.train, self.config.checkpoint
        self._announce()
        batches = train_batches(
            self.session.train_dataset,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=groups.dp_group().rank(),
            data_parallel_size=groups.dp_group().size(),
            start_step=self.step,
            end_step=self.steps,
        )
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            unit="step",
            desc="train",
            disable=not self.session.first,
            dynamic_ncols=True,
        )
        self.metrics.restart_clock()
        started = time.monotonic()
        profile = self.run_dir / "tensorboard" if self.config.monitor.profile and self.session.first else None
        with bar, profiled(profile) as profile_step:
            if self.step and _due(self.step, train.eval_interval) and self.step < self.steps:
                self._validate()
                self.metrics.restart_clock()
            for micro_batches in self.timer.each("data", batches):
                self._train_step(micro_batches)
                self.step += 1
                bar.update()
                with self.timer.part("save"):
                    self.saver.advance()
                profile_step()
                if self.step == self.session.start_step + 1:
                    self.clock.mark("first step")
                    logger.info(str(self.clock))
                stopping = self._stop_agreed()
                validating = _due(self.step, train.eval_interval) and self.step < self.steps
                evaluating = self.config.evaluate.suite is not None and _due(self.step, self.config.evaluate.interval)
                saving = _due(self.step, checkpoint.interval) or self.step == self.steps or stopping or evaluating
                if _due(self.step, self.config.monitor.log_interval) or validating or saving:
                    self._log(bar)
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
                    self.metrics.restart_clock()
            self._finish_saving()
            self.seconds = time.monotonic() - started
        self._summarise(*self._validate())
        return Outcome(0, "finished", self.step)

    def _train_step(self, micro_batches: list[torch.Tensor]) -> None:
        engine, losses = self.session.engine, []
        self.telemetry.begin_step(self.step + 1)
        for tokens in micro_batches:
            with self.timer.part("forward"):
                loss, added = self._losses(tokens.to(self.session.device))
            losses.append(loss.detach())
            loss = loss + added
            if len(losses) == len(micro_batches) and self.health.skips_spike(losses):
                loss = loss * math.nan
            with self.timer.part("backward"):
                engine.backward(loss)
            self.watchdog.progress(self.step)
        self.telemetry.before_update()
        lr = learning_rate(self.config.optimizer, self.step, self.steps)
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
            self._finish_saving()  # a Fault names the newest checkpoint
            self.health.skipped(self.step + 1, losses)

    def _losses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of a micro-batch [B, S + 1], and what distillation adds to it."""
        model, teacher, end = self.session.engine.model, self.session.teacher, self.session.eos_token_id
        if teacher is None:
            loss = token_losses(model, tokens, end).mean()
            return loss, loss.new_zeros(())
        losses, divergences = distilled_losses(model, teacher, tokens, end)
        return losses.mean(), self.config.distillation.weight * divergences.mean()

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; the answer is the same on all."""
        self.stop.limit(self.config.train.max_seconds)
        asked = torch.tensor([self.stop.reason is not None], dtype=torch.int32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(asked)

    def _log(self, bar: tqdm) -> None:
        interval = self.telemetry.log(self.step)
        for metrics in interval.steps:
            self.health.observe(metrics)
            loss = metrics.lm_loss + self.config.moh.balance_weight * metrics.balance_loss
            if self.records:
                self.records.write([{**dataclasses.asdict(metrics), "loss": loss}])
        if interval.steps:
            self.last = interval
            newest = interval.steps[-1]
            bar.set_postfix(loss=f"{newest.lm_loss:.3f}", tok_s=f"{newest.tokens_per_second:,.0f}", refresh=False)

    def _save(self, *, wait: bool) -> None:
        """Save this step, unless it is saved; ``wait`` until it is on the disk."""
        session = self.session
        with self.watchdog.phase("save"), self.timer.part("save"):
            self.saver.finish()  # two copies of the state need not fit into host memory
            if self.saved_step != self.step:
                data, hf_extras, engine = session.data.hash, session.hf_extras, session.engine
                in_use = self.evaluation.in_use if self.evaluation else frozenset[int]()
                self.saver.begin(Snapshot.take(self.config, self.step, data, hf_extras, engine), in_use)
                self.saved_step = self.step
            if wait or not self.config.checkpoint.async_:
                self.saver.finish()

    def _finish_saving(self) -> None:
        with self.watchdog.phase("save"):
            self.saver.finish()

    def _validate(self) -> tuple[float | None, str]:
        """Validation loss in nats a token, the sources' losses by their shares of this step (None where no text is held
        out), and a sample of text."""
        with self.watchdog.phase("validation"):
            return self._validated()

    def _validated(self) -> tuple[float | None, str]:
        session, module = self.session, self.session.engine.module
        losses: dict[str, float] = {}
        for name, dataset in session.validation_datasets.items():
            batches = validation_batches(
                dataset,
                micro_batch_size=self.config.train.micro_batch_size,
                data_parallel_rank=groups.dp_group().rank(),
                data_parallel_size=groups.dp_group().size(),
            )
            losses[name] = validation_loss(module, batches, session.device, session.eos_token_id)
        loss = mean_by_shares(self.config, self.step, losses)
        text = sample_text(module, self.config, session.tokenizer, session.device)
        if session.first:
            if loss is not None:
                tqdm.write(f"step {self.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.1f}")
            if len(losses) > 1:
                tqdm.write("  " + ", ".join(f"{name} {each:.4f}" for name, each in losses.items()))
            tqdm.write(f"  | {text}")
        if self.validations:
            sources = {"sources": losses} if len(losses) > 1 else {}
            self.validations.write([{"step": self.step, "loss": loss, **sources, "sample": text}])
        if self.board:
            self.board.validation(loss, text, self.step, losses if len(losses) > 1 else None)
        return loss, text

    def _announce(self) -> None:
        config, world = self.config, self.session.world
        count = parameter_count(config.model, config.moh)
        tensor = config.parallel.tensor
        where = f"resumed after step {self.step}" if self.step else "from the start"
        logger.info(
            f"{config.run.dir}: {count.total:,} parameters, TP {tensor} x DP {world.size // tensor}, "
            f"ZeRO {config.parallel.zero_stage}, {config.train.precision}, {self.session.device.type}, "
            f"attention {attention_backend(config, self.session.device)}; "
            f"{self.steps:,} steps of {config.train.tokens_per_step:,} tokens, {where}"
        )
        if warning := attention_warning(config, self.session.device):
            logger.warning(warning)
        if config.data.sources:
            logger.info(self.session.data.budget(config))
        if config.moh.enabled:
            logger.info(head_report(config))

    def _summarise(self, val_loss: float | None, text: str) -> None:
        if self.session.first:
            applied = [metrics.lm_loss for metrics in self.last.steps if not metrics.skipped] if self.last else []
            last = applied[-1] if applied else None
            summarise(self.session, self.step, self.seconds, self.clock, last, val_loss, text)
            if self.evaluation:
                self.evaluation.finish(self.watchdog.timeout / 2)
            self.telemetry.finish({"final/validation_loss": val_loss, "final/train_loss": last})

    def close(self) -> None:
        if self.evaluation:
            self.evaluation.stop()
        self.telemetry.close()
        for writer in (self.records, self.validations, self.skips):
            if writer is not None:
                writer.close()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
