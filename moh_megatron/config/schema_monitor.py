"""What a run shows and judges while it trains: the sections ``monitor`` and ``evaluate`` of the configuration."""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from moh_megatron.config.types import Bool, NonNegativeInt, PathText, PositiveFloat, PositiveFraction, PositiveInt

_FORBID_UNKNOWN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class MonitorConfig:
    log_interval: PositiveInt = 10
    """Steps between transfers of the metrics from the device; metrics.jsonl still has a line for each step."""
    tensorboard: Bool = True
    """Event files in <run.dir>/tensorboard."""
    image_interval: NonNegativeInt = 100
    """Steps between heat maps and histograms of head load, at a logging interval; 0: none."""
    peak_tflops: PositiveFloat | None = None
    """What one device could do, for MFU; null: known for common GPUs in bf16, else MFU is left out."""
    wandb_project: str | None = None
    """A project of Weights & Biases to write to as well; needs its package."""
    prometheus: PathText | None = None
    """A file that holds the newest scalars in Prometheus' text format."""
    alarm_dead_heads: PositiveFraction | None = 0.1
    """Warn of routed heads with less than this share of the fair load; null: never. As the other alarms, in the log
    and in TensorBoard."""
    alarm_entropy: PositiveFraction | None = 0.05
    """Warn where a layer's router is surer than this share of an even choice's entropy; null: never."""
    alarm_balance: PositiveFloat | None = 0.5
    """Warn where the balance loss is this far off an even load, in units of the way to the same heads for every token;
    null: never."""
    alarm_mfu_drop: PositiveFraction | None = 0.3
    """Warn where the rate of the last intervals, and so MFU, is this share below the usual; null: never."""
    alarm_slow_rank: PositiveFloat | None = 1.5
    """Warn where a rank's data and forward pass take so many times the median rank's; null: never."""
    profile: Bool = False
    """Write a torch profiler trace of a few steps of rank 0 to <run.dir>/tensorboard; --profile does the same."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class EvaluateConfig:
    """Tasks while a model trains: on a checkpoint, by another process on the first node."""

    suite: PathText | None = None
    """A file as in configs/eval; null: no tasks."""
    interval: NonNegativeInt = 0
    """Steps between evaluations, at which a checkpoint is saved; 0: none. One that is due while another runs is left
    out."""
    limit: PositiveInt | None = 100
    """Questions of each task; null: all."""
    device: str = "cpu"
    """cpu leaves the GPUs to the training."""
