"""Detects, reports and limits bad steps: a loss or gradient that is not finite, and loss spikes.

The engine skips a step whose gradient is not finite, on all ranks alike. To skip a spike, the last micro-batch's loss
is made NaN, so that the engine's check for non-finite gradients skips it.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.checkpoint.layout import complete_checkpoints
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import ONLY
from moh_megatron.data.batches import micro_batch_samples
from moh_megatron.data.dataset import DocumentPosition, Sequences
from moh_megatron.io.errors import Fault
from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.records import StepRecords, read_records
from moh_megatron.parallel import groups

logger = logging.getLogger(__name__)

_NAMED_SAMPLES = 8


class SpikeDetector:
    """Computes the z-score of a loss over the last ``window`` losses; finds no spike until it has so many."""

    def __init__(self, zscore: float | None, window: int, earlier: Iterable[float] = ()) -> None:
        self._zscore = zscore
        self._losses: deque[float] = deque(earlier, window)

    def score(self, loss: float) -> float | None:
        """Return how many standard deviations ``loss`` lies above the mean, if it is a spike."""
        if self._zscore is None or len(self._losses) < (self._losses.maxlen or 0):
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        excess = loss - mean
        score = excess / deviation if deviation else math.inf
        return score if excess > 0 and score > self._zscore else None

    def add(self, loss: float) -> None:
        """Add a loss to the window that the next ones are compared with."""
        if self._zscore is not None and math.isfinite(loss):
            self._losses.append(loss)


@dataclass(frozen=True)
class _Suspect:
    """One micro-batch of a skipped step."""

    rank: int
    loss: float
    samples: list[int]


def earlier_losses(config: Config, metrics: Path, step: int, control: dist.ProcessGroup) -> list[float]:
    """Return the last losses up to ``step``, which spikes are compared with; rank 0 reads them from metrics.jsonl."""
    found: list[list[float]] = [[]]
    if dist.get_rank() == 0 and step:
        applied = [record for record in read_records(metrics) if not record.get("skipped")]
        losses = [record["lm_loss"] for record in applied if record["step"] <= step]
        found = [losses[-config.train.spike_window :]]
    dist.broadcast_object_list(found, src=0, group=control)
    return found[0]


class Health:
    """Decides on every rank alike which steps are skipped, and when there are too many.

    Args:
        control: a group of all ranks whose tensors lie on the host.
        earlier: losses of the steps before, with which a resumed run goes on.
        records: skipped.jsonl, where this rank writes it.
    """

    def __init__(
        self,
        config: Config,
        dataset: Sequences,
        control: dist.ProcessGroup,
        earlier: list[float],
        records: StepRecords | None,
    ) -> None:
        self._config, self._train, self._dataset, self._control = config, config.train, dataset, control
        self._records = records
        self._spikes = SpikeDetector(self._train.spike_zscore, self._train.spike_window, earlier)
        self._score: float | None = None
        self._skipped_in_a_row = 0

    def skips_spike(self, losses: list[Tensor]) -> bool:
        """Return whether to skip the step with these losses as a spike; called before its last backward pass.

        Without train.skip_spikes it returns False and computes nothing.
        """
        if not self._train.skip_spikes:
            return False
        group = groups.dp_group()
        mean = torch.stack(losses).double().mean()
        dist.all_reduce(mean, group=group)
        loss = float(mean) / group.size()
        self._score = self._spikes.score(loss)
        if self._score is None:
            self._spikes.add(loss)
        return self._score is not None

    def skipped(self, step: int, losses: list[Tensor]) -> None:
        """Report that step number ``step`` (1 for the first) was skipped; every rank calls this.

        Raises Fault if more than train.max_bad_steps were skipped in a row.
        """
        self._skipped_in_a_row += 1
        suspects = self._suspects(step, losses)
        samples = sorted({sample for suspect in suspects for sample in suspect.samples})
        if self._score is not None:
            reason = (
                f"its loss is a spike, {self._score:.1f} standard deviations above the last {self._train.spike_window}"
            )
        elif bad := sorted({suspect.rank for suspect in suspects if not math.isfinite(suspect.loss)}):
            reason = f"the loss is not finite on rank {', '.join(map(str, bad))}"
        else:
            reason = "the gradient is not finite, though every loss is"
        self._score = None
        documents = {sample: self._dataset.documents(sample) for sample in samples}
        if self._records:
            values = {sample: [asdict(document) for document in found] for sample, found in documents.items()}
            self._records.write([{"step": step, "reason": reason, "samples": values}])
        lines = [f"  sample {sample}: {_names(documents[sample])}" for sample in samples[:_NAMED_SAMPLES]]
        if len(samples) > _NAMED_SAMPLES:
            lines.append(f"  and {len(samples) - _NAMED_SAMPLES} more samples")
        logger.warning(
            "\n".join(
                [
                    f"step {step} is skipped, {self._skipped_in_a_row} in a row (train.max_bad_steps is "
                    f"{self._train.max_bad_steps}): {reason}. Read from {self._dataset.name}:",
                    *lines,
                ]
            )
        )
        if self._skipped_in_a_row > self._train.max_bad_steps:
            root = checkpoint_dir(self._config)
            good = next((str(path) for path, _ in complete_checkpoints(root, up_to=step - 1)), f"none in {root}")
            raise Fault(
                f"step {step}: {reason}. {self._skipped_in_a_row} steps in a row were skipped, more than "
                f"train.max_bad_steps ({self._train.max_bad_steps}). Last good checkpoint: {good}. Lower "
                f"optimizer.learning_rate or raise optimizer.warmup_steps and start again."
            )

    def applied(self) -> None:
        """Record that a step changed the weights."""
        self._skipped_in_a_row = 0

    def observe(self, metrics: StepMetrics) -> None:
        """Report the loss of a step, reduced at the logging interval, if it is a spike that was not skipped."""
        if self._train.skip_spikes or metrics.skipped:
            return
        score = self._spikes.score(metrics.lm_loss)
        if score is not None:
            last = metrics.step * self._train.global_batch_size - 1
            logger.warning(
                f"step {metrics.step}: the loss {metrics.lm_loss:.4f} is a spike, {score:.1f} standard "
                f"deviations above the last {self._train.spike_window}; samples "
                f"{last + 1 - self._train.global_batch_size} to {last} of {self._dataset.name}"
            )
        self._spikes.add(metrics.lm_loss)

    def _suspects(self, step: int, losses: list[Tensor]) -> list[_Suspect]:
        """Return the micro-batches of all ranks whose loss is not finite, or all where there is none."""
        group = groups.dp_group()
        samples = micro_batch_samples(
            step - 1, self._train.global_batch_size, self._train.micro_batch_size, group.rank(), group.size()
        )
        own = [
            _Suspect(dist.get_rank(), float(loss), list(numbers)) for loss, numbers in zip(losses, samples, strict=True)
        ]
        gathered: list[list[_Suspect]] = [[] for _ in range(self._control.size())]
        dist.all_gather_object(gathered, own, group=self._control)
        micro_batches = [suspect for suspects in gathered for suspect in suspects]
        return [suspect for suspect in micro_batches if not math.isfinite(suspect.loss)] or micro_batches


def _names(documents: list[DocumentPosition]) -> str:
    first, *more = (str(document.document) for document in documents)
    start = f"document {first} from token {documents[0].token}"
    source = "" if documents[0].source == ONLY else f"{documents[0].source} "
    return source + ", ".join([start, *more])
