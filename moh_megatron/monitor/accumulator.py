"""Keeps step metrics on the device until the logging interval, then reduces them and moves them to the host at once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepMetrics:
    """One step, averaged over micro-batches and data-parallel ranks."""

    step: int
    tokens: int
    """Number of tokens trained on so far, this step included."""
    lm_loss: float
    balance_loss: float
    """Mean over the MoH layers, before the factor beta; 0 in a dense model."""
    grad_norm: float
    lr: float
    tokens_per_second: float
    skipped: bool = False
    """Whether the step changed nothing: its loss or gradient was not finite, or its loss was a spike."""


@dataclass
class _Pending:
    step: int
    lr: float
    values: Tensor
    """[2] local means: language-model loss, balance loss."""
    grad_norm: Tensor
    skipped: bool


@dataclass(frozen=True)
class Interval:
    """All steps since the last flush, and the head load over them."""

    steps: list[StepMetrics]
    head_load: Tensor | None
    """[L, N] share of tokens that used each head (logical order), None in a dense model."""
    observed: Tensor | None = None
    """[L, M] means of what was observed in each layer; None where nothing was observed."""
    seconds_per_step: float = 0.0


@dataclass
class MetricsAccumulator:
    """Collects steps; ``flush`` reduces them over the data-parallel ranks, and every rank calls it at the same step.

    ``sequence_group``: under sequence parallelism, the ranks that each observe a part of the sequence.
    """

    group: dist.ProcessGroup
    tokens_per_step: int
    sequence_group: dist.ProcessGroup | None = None
    _pending: list[_Pending] = field(default_factory=list)
    _counts: Tensor | None = None
    _observed: Tensor | None = None
    _since: float = field(default_factory=time.monotonic)

    def restart_clock(self) -> None:
        """Leave the time since the last flush, such as that of a validation or a save, out of the next rate."""
        self._since = time.monotonic()

    def add(
        self,
        step: int,
        lr: float,
        losses: list[Tensor],
        grad_norm: Tensor,
        routers: Tensor | None,
        *,
        skipped: bool = False,
    ) -> None:
        """Add a finished step.

        ``losses``: one scalar per micro-batch. ``routers`` [L, N + 1]: for each MoH layer the number of tokens that
        used each head, and the mean balance loss. The heads of a ``skipped`` step are not counted.
        """
        lm_loss = torch.stack(losses).double().mean()
        balance = lm_loss.new_zeros(()) if routers is None else routers[:, -1].mean()
        self._pending.append(_Pending(step, lr, torch.stack([lm_loss, balance]), grad_norm, skipped))
        if routers is not None and not skipped:
            counts = routers[:, :-1]
            self._counts = counts if self._counts is None else self._counts + counts

    def observe(self, observed: Tensor | None) -> None:
        """Set what was observed in the last step that was added: [L, M] means over this rank's tokens."""
        self._observed = observed

    def flush(self) -> Interval:
        """Everything since the last flush, reduced and on the host."""
        if not self._pending:
            return Interval([], None)
        pending, counts, observed = self._pending, self._counts, self._observed
        self._pending, self._counts, self._observed = [], None, None
        parts = [torch.cat([entry.values for entry in pending])]
        parts += [tensor.flatten() for tensor in (counts, observed) if tensor is not None]
        reduced = torch.cat(parts)
        dist.all_reduce(reduced, group=self.group)
        reduced /= self.group.size()
        if observed is not None:
            observed = reduced[-observed.numel() :].view_as(observed)
            if self.sequence_group is not None:
                dist.all_reduce(observed, group=self.sequence_group)
                observed /= self.sequence_group.size()
        norms = torch.stack([entry.grad_norm.to(reduced.device) for entry in pending]).tolist()
        losses = reduced[: 2 * len(pending)].view(-1, 2).tolist()
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9) / len(pending)
        rate = self.tokens_per_step / seconds
        self._since = now
        steps = [
            StepMetrics(
                step=entry.step,
                tokens=entry.step * self.tokens_per_step,
                lm_loss=lm_loss,
                balance_loss=balance,
                grad_norm=norm,
                lr=entry.lr,
                tokens_per_second=rate,
                skipped=entry.skipped,
            )
            for entry, (lm_loss, balance), norm in zip(pending, losses, norms, strict=True)
        ]
        load = None
        if counts is not None:
            applied = sum(not entry.skipped for entry in pending)
            local_tokens = applied * self.tokens_per_step / self.group.size()
            start = 2 * len(pending)
            load = (reduced[start : start + counts.numel()].view_as(counts) / local_tokens).cpu()
        return Interval(steps, load, None if observed is None else observed.cpu(), seconds)
