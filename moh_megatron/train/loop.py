"""The training loop. Read it top to bottom."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from moh_megatron.checkpoint import save
from moh_megatron.config.blend import shares_until
from moh_megatron.config.count import parameter_count
from moh_megatron.config.errors import Fault
from moh_megatron.config.load import dump_config
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.batches import train_batches, validation_batches
from moh_megatron.model.build import attention_backend, moh_layers, token_losses
from moh_megatron.moh.balancing import follow_schedule, update_biases
from moh_megatron.monitor.accumulator import Interval, MetricsAccumulator
from moh_megatron.monitor.board import Board
from moh_megatron.monitor.records import StepRecords
from moh_megatron.parallel import groups
from moh_megatron.train.announce import head_report
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.setup import Session, prepare_session
from moh_megatron.train.signals import EXIT_STOPPED, StopRequest
from moh_megatron.train.summary import summarise
from moh_megatron.train.validation import sample_text, validation_loss
from moh_megatron.train.world import World


@dataclass(frozen=True)
class Outcome:
    """How training ended: exit code, reason, last finished step."""

    code: int
    reason: str
    step: int


def train(config: Config, world: World, stop: StopRequest) -> Outcome:
    """Train to the end, or until ``stop`` asks for an end on any rank; the state is saved either way."""
    session = prepare_session(config, world)
    training = _Training(session, stop)
    try:
        return training.run()
    finally:
        training.close()


class _Training:
    def __init__(self, session: Session, stop: StopRequest) -> None:
        config = session.config
        self.session, self.config, self.stop = session, config, stop
        self.steps = config.train.steps
        self.run_dir = Path(config.run.dir)
        self.saved_step = session.start_step
        self.step = session.start_step
        self.seconds = 0.0
        self.layers = moh_layers(session.engine.module)
        follow_schedule(self.layers, self.step)
        self.metrics = MetricsAccumulator(groups.data_group(), config.train.tokens_per_step)
        # NCCL would need a transfer to the device and back to agree on a flag.
        self.control_group = dist.new_group(backend="gloo")
        self.last: Interval | None = None
        self.records: StepRecords | None = None
        self.validations: StepRecords | None = None
        self.board: Board | None = None
        if session.first:
            self._open_run_folder()

    def _open_run_folder(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / ".config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        (self.run_dir / ".config.yaml").replace(self.run_dir / "config.yaml")
        start = self.session.start_step
        self.records = StepRecords(self.run_dir / "metrics.jsonl", start)
        # The checkpoint of a step is saved before its validation: what was cut short is done again.
        self.validations = StepRecords(self.run_dir / "validation.jsonl", start - 1)
        if self.config.monitor.tensorboard:
            self.board = Board(self.run_dir / "tensorboard", start)

    def run(self) -> Outcome:
        train, checkpoint = self.config.train, self.config.checkpoint
        self._announce()
        batches = train_batches(
            self.session.train_dataset,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=groups.data_group().rank(),
            data_parallel_size=groups.data_group().size(),
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
        with bar:
            if self.step and _due(self.step, train.eval_interval) and self.step < self.steps:
                self._validate()
                self.metrics.restart_clock()
            for micro_batches in batches:
                self._train_step(micro_batches)
                self.step += 1
                bar.update()
                stopping = self._stop_agreed()
                validating = _due(self.step, train.eval_interval) and self.step < self.steps
                saving = _due(self.step, checkpoint.interval) or self.step == self.steps or stopping
                if _due(self.step, self.config.monitor.log_interval) or validating or saving:
                    self._log(bar)
                if saving:
                    self._save()
                if stopping:
                    return Outcome(EXIT_STOPPED, f"{self.stop.reason or 'a signal to another rank'}: saved", self.step)
                if validating:
                    self._validate()
                if saving or validating:
                    self.metrics.restart_clock()
            self.seconds = time.monotonic() - started
        self._summarise(*self._validate())
        return Outcome(0, "finished", self.step)

    def _train_step(self, micro_batches: list[torch.Tensor]) -> None:
        engine, losses = self.session.engine, []
        for tokens in micro_batches:
            loss = token_losses(engine.model, tokens.to(self.session.device), self.session.end_of_document).mean()
            engine.backward(loss)
            losses.append(loss.detach())
        lr = learning_rate(self.config.optimizer, self.step, self.steps)
        grad_norm = engine.step(lr)
        routers = None
        if self.layers:
            routers = torch.stack([layer.statistics.drain(self.session.device) for layer in self.layers])
            update_biases(self.layers, routers[:, :-1], groups.data_group())
            follow_schedule(self.layers, self.step + 1)
        self.metrics.add(self.step + 1, lr, losses, grad_norm, routers)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; the answer is the same on all."""
        asked = torch.tensor([self.stop.reason is not None], dtype=torch.int32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.control_group)
        return bool(asked)

    def _log(self, bar: tqdm) -> None:
        interval = self.metrics.flush()
        moh = self.config.moh
        beta = moh.balance_coefficient if self.layers and moh.balancing == "loss" else 0.0
        for metrics in interval.steps:
            if not (math.isfinite(metrics.lm_loss) and math.isfinite(metrics.grad_norm)):
                raise Fault(
                    f"step {metrics.step}: the loss is {metrics.lm_loss} and the gradient norm {metrics.grad_norm}. "
                    f"The last checkpoint is of step {self.saved_step}; lower optimizer.learning_rate or raise "
                    f"optimizer.warmup_steps and start again."
                )
            loss = metrics.lm_loss + beta * metrics.balance_loss
            if self.records:
                self.records.write([{**dataclasses.asdict(metrics), "loss": loss}])
            if self.board:
                self.board.step(metrics, loss)
        if interval.steps:
            self.last = interval
            newest = interval.steps[-1]
            bar.set_postfix(loss=f"{newest.lm_loss:.3f}", tok_s=f"{newest.tokens_per_second:,.0f}", refresh=False)
        if self.board and interval.head_load is not None:
            self.board.head_load(interval.head_load, self.step)

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        session, engine, root = self.session, self.session.engine, checkpoint_dir(self.config)
        parameters = sum(p.numel() * p.element_size() for p in engine.module.parameters())
        replica = groups.data_group().rank() == 0
        contents = save.Contents(
            config=self.config,
            step=self.step,
            tokens=self.step * self.config.train.tokens_per_step,
            data=session.data.hash,
            model=engine.module,
            tokenizer=session.tokenizer,
            save_engine=engine.save,
            # DeepSpeed keeps a second copy of the weights, and fp32 masters beside Adam's two moments.
            expected_bytes=int(2 * parameters * replica + 1.5 * engine.optimizer_state_bytes),
        )
        save.save(root, contents)
        self.saved_step = self.step
        if self.config.checkpoint.keep_last is not None and session.first:
            save.prune(root, self.config.checkpoint.keep_last, self.step)

    def _validate(self) -> tuple[float, str]:
        """Validation loss in nats a token, the sources' losses by their shares of this step, and a sample of text."""
        session, module = self.session, self.session.engine.module
        losses: dict[str, float] = {}
        for name, dataset in session.validation_datasets.items():
            batches = validation_batches(
                dataset,
                micro_batch_size=self.config.train.micro_batch_size,
                data_parallel_rank=groups.data_group().rank(),
                data_parallel_size=groups.data_group().size(),
            )
            losses[name] = validation_loss(module, batches, session.device, session.end_of_document)
        shares = shares_until(self.config, max(self.step, 1))[-1][1]
        loss = sum(shares[name] * each for name, each in losses.items())
        text = sample_text(module, self.config, session.tokenizer, session.device)
        if session.first:
            tqdm.write(f"step {self.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 50)):.1f}")
            if len(losses) > 1:
                tqdm.write("  " + ", ".join(f"{name} {each:.4f}" for name, each in losses.items()))
            tqdm.write(f"  | {text}")
        if self.validations:
            sources = {"sources": losses} if len(losses) > 1 else {}
            self.validations.write([{"step": self.step, "loss": loss, **sources, "sample": text}])
        if self.board:
            self.board.validation(loss, text, self.step)
        return loss, text

    def _announce(self) -> None:
        config, world = self.config, self.session.world
        count = parameter_count(config.model, config.moh)
        tensor = config.parallel.tensor
        where = f"resumed after step {self.step}" if self.step else "from the start"
        self.session.report(
            f"{config.run.dir}: {count.total:,} parameters, TP {tensor} x DP {world.size // tensor}, "
            f"ZeRO {config.parallel.zero_stage}, {config.train.precision}, {self.session.device.type}, "
            f"attention {attention_backend(config, self.session.device)}; "
            f"{self.steps:,} steps of {config.train.tokens_per_step:,} tokens, {where}"
        )
        if config.data.sources:
            self.session.report(self.session.data.budget(config))
        if config.moh.enabled:
            self.session.report(head_report(config))

    def _summarise(self, val_loss: float, text: str) -> None:
        if self.session.first:
            last = self.last.steps[-1].lm_loss if self.last else None
            summarise(self.session, self.step, self.seconds, last, val_loss, text)

    def close(self) -> None:
        for writer in (self.records, self.validations, self.board):
            if writer is not None:
                writer.close()


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
