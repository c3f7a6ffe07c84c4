"""TensorBoard: the scalars of metrics.jsonl, the load of every head, samples of text."""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.records import naming


class Board:
    """One run's event files; a resumed run's steps after ``start_step`` replace those of its earlier life."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = str(folder)
        # TensorBoard writes in a thread of its own, and raises again in the next call what went wrong there.
        original = threading.excepthook
        threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else original(args)
        with naming(self._folder):
            self._writer = SummaryWriter(self._folder, purge_step=start_step + 1)

    def step(self, metrics: StepMetrics, loss: float) -> None:
        """Scalars of one step; ``loss`` is the total."""
        with naming(self._folder):
            step = metrics.step
            self._writer.add_scalar("loss/total", loss, step)
            self._writer.add_scalar("loss/lm", metrics.lm_loss, step)
            self._writer.add_scalar("loss/balance", metrics.balance_loss, step)
            self._writer.add_scalar("optimizer/grad_norm", metrics.grad_norm, step)
            self._writer.add_scalar("optimizer/lr", metrics.lr, step)
            self._writer.add_scalar("throughput/tokens", metrics.tokens, step)
            self._writer.add_scalar("throughput/tokens_per_second", metrics.tokens_per_second, step)

    def head_load(self, load: Tensor, step: int) -> None:
        """``load`` [L, N]: share of tokens that used each head; a scalar for each, grouped by layer."""
        with naming(self._folder):
            for layer, heads in enumerate(load.tolist()):
                for head, share in enumerate(heads):
                    self._writer.add_scalar(f"head_load/layer_{layer:02d}/head_{head:02d}", share, step)

    def validation(self, loss: float | None, sample: str, step: int) -> None:
        """Validation loss (nats a token), None without held-out text, and what the model writes."""
        with naming(self._folder):
            if loss is not None:
                self._writer.add_scalar("loss/validation", loss, step)
            self._writer.add_text("sample", sample, step)
            self._writer.flush()

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()
