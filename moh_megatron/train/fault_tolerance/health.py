"""Steps that must not count: a loss or gradient that is not finite, a loss spike. Reported, counted, limited.

The engine skips a step whose gradient is not finite, on all ranks alike. So a step is given up by one means only: its
last micro-batch's loss is made NaN before the backward pass.
"""

from __future__ import annotations

import logging
import math
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
from moh_megatron.data.dataset import Place, Sequences
from moh_megatron.io.errors import Fault
from moh_megatron.monitor.accumulator import StepMetrics
from moh_megatron.monitor.records import StepRecords, read_records
from moh_megatron.parallel import groups
from moh_megatron.train.fault_tolerance.spikes import SpikeDetector

logger = logging.getLogger(__name__)

_NAMED_SAMPLES = 8


@dataclass(frozen=True)
class _Suspect:
    """One micro-batch of a skipped step."""

    rank: int
    loss: float
    samples: list[int]


def earlier_losses(config: Config, metrics: Path, step: int, control: dist.ProcessGroup) -> list[float]:
    """The last losses up to ``step`` that a spike is measured by, as rank 0 reads them from metrics.jsonl."""
    found: list[list[float]] = [[]]
    if dist.get_rank() == 0 and step:
        applied = [record for record in read_records(metrics) if not record.get("skipped")]
        losses = [record["lm_loss"] for record in applied if record["step"] <= step]
        found = [losses[-config.train.spike_window :]]
    dist.broadcast_object_list(found, src=0, group=control)
    return found[0]


class Health:
    """The same on every rank; rank 0 reports.

    ``earlier``: losses of the steps before, which a resumed run goes on with. ``control``: a group of all ranks whose
    tensors lie on the host.
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
        self._in_a_row = 0

    def gives_up(self, losses: list[Tensor]) -> bool:
        """Whether the step with these micro-batch losses is to be given up as a spike, before its last backward pass.

        Without train.skip_spikes it never is, and nothing is computed.
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
        """Step number ``step`` (1 for the first) was skipped; every rank calls it.

        Raises Fault if it is one too many in a row.
        """
        self._in_a_row += 1
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
        places = {sample: self._dataset.places(sample) for sample in samples}
        if self._records:
            documents = {sample: [asdict(place) for place in found] for sample, found in places.items()}
            self._records.write([{"step": step, "reason": reason, "samples": documents}])
        named = [f"  sample {sample}: {_prose(places[sample])}" for sample in samples[:_NAMED_SAMPLES]]
        if len(samples) > _NAMED_SAMPLES:
            named.append(f"  and {len(samples) - _NAMED_SAMPLES} more samples")
        logger.warning(
            "\n".join(
                [
                    f"step {step} is skipped, {self._in_a_row} in a row (train.max_bad_steps is "
                    f"{self._train.max_bad_steps}): {reason}. Read from {self._dataset.name}:",
                    *named,
                ]
            )
        )
        if self._in_a_row > self._train.max_bad_steps:
            root = checkpoint_dir(self._config)
            good = next((str(path) for path, _ in complete_checkpoints(root, up_to=step - 1)), f"none in {root}")
            raise Fault(
                f"step {step}: {reason}. {self._in_a_row} steps in a row were skipped, more than train.max_bad_steps "
                f"({self._train.max_bad_steps}). Last good checkpoint: {good}. Lower optimizer.learning_rate or raise "
                f"optimizer.warmup_steps and start again."
            )

    def applied(self) -> None:
        """A step went well."""
        self._in_a_row = 0

    def observe(self, metrics: StepMetrics) -> None:
        """A step's reduced loss, at the logging interval: report it if it is a spike that was not skipped."""
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
        """The micro-batches whose loss is not finite, of all ranks; all of them where none is."""
        group = groups.dp_group()
        samples = micro_batch_samples(
            step - 1, self._train.global_batch_size, self._train.micro_batch_size, group.rank(), group.size()
        )
        own = [_Suspect(dist.get_rank(), float(loss), list(each)) for loss, each in zip(losses, samples, strict=True)]
        gathered: list[list[_Suspect]] = [[] for _ in range(self._control.size())]
        dist.all_gather_object(gathered, own, group=self._control)
        every = [suspect for suspects in gathered for suspect in suspects]
        return [suspect for suspect in every if not math.isfinite(suspect.loss)] or every


def _prose(places: list[Place]) -> str:
    first, *more = (str(place.document) for place in places)
    start = f"document {first} from token {places[0].token}"
    source = "" if places[0].source == ONLY else f"{places[0].source} "
    return source + ", ".join([start, *more])
