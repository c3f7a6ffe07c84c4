"""Raises alarms about problems that a loss curve does not show. Every threshold is a key of the ``monitor`` section."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moh_megatron.config.schema import MonitorConfig
from moh_megatron.monitor.head_figures import HeadFigures
from moh_megatron.monitor.metrics_logger import slowest_over_median

RESOLVED = "resolved: "
"""The prefix of a message about an alarm that has ended."""
_MAX_NAMED = 6
"""Dead heads named in a message, at most."""
_DROP, _SLOW = 0.3, 1.5
"""What auto means on an accelerator for the drop of the rate and for the time of the slowest rank."""
_RATES, _RECENT = 50, 5
"""Intervals of which the usual rate is the median, and recent intervals that are compared with it."""


@dataclass(frozen=True)
class AlarmInputs:
    """The figures of one interval."""

    tokens_per_second: float
    steps: int = 1
    """How many steps of the interval changed the weights; the figures of heads and balance are means over them."""
    heads: HeadFigures | None = None
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    balance_excess: float | None = None
    """As ``head_figures.balance_excess`` returns it."""
    busy: Sequence[float] = ()
    """As ``IntervalStats.busy``."""


@dataclass(frozen=True)
class _Alarm:
    location: object
    """The heads, layers or rank that it is about; the alarm is raised again where they change."""
    message: str


class _RecentMeans:
    """The means of some figures over the newest intervals that have at least ``steps`` steps together."""

    def __init__(self, steps: int) -> None:
        self._least = steps
        self._intervals: deque[tuple[int, Sequence[float]]] = deque()

    def add(self, steps: int, figures: Sequence[float]) -> list[float] | None:
        """Add the figures of an interval of ``steps`` steps and return the means; None before there are enough."""
        self._intervals.append((steps, figures))
        total = sum(steps for steps, _ in self._intervals)
        while total - self._intervals[0][0] >= self._least:
            total -= self._intervals.popleft()[0]
        if total < self._least:
            return None
        weights = [steps / total for steps, _ in self._intervals]
        return [
            sum(weight * value for weight, value in zip(weights, values, strict=True))
            for values in zip(*(figures for _, figures in self._intervals), strict=True)
        ]


class Alarms:
    """Compares figures with the thresholds. A kind of alarm without figures in an interval stays as it was.

    Alarms about routing judge means over ``monitor.alarm_steps`` steps, those about time medians over some intervals: a
    single interval is no evidence.

    Args:
        balance_key: the key to raise for a more even load.
        accelerator: whether the run has one: what auto means for alarms about time.
        mfu: whether MFU is known; an alarm about a low rate names it.
    """

    def __init__(
        self,
        config: MonitorConfig,
        balance_key: str = "moh.balance_coefficient",
        *,
        accelerator: bool = True,
        mfu: bool = True,
    ) -> None:
        self._rate_name = "MFU" if mfu else "speed"
        self._largest_drop = _resolve(config.alarm_mfu_drop, _DROP if accelerator else None)
        self._slow_rank_ratio = _resolve(config.alarm_slow_rank, _SLOW if accelerator else None)
        self._config = config
        self._balance_key = balance_key
        self._active: dict[str, _Alarm] = {}
        self._load, self._entropy, self._balance = (_RecentMeans(config.alarm_steps) for _ in range(3))
        self._rates: deque[float] = deque(maxlen=_RATES)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._busy: deque[Sequence[float]] = deque(maxlen=_RECENT)

    def check(self, inputs: AlarmInputs) -> list[str]:
        """A message about each alarm that began, changed or ended with this interval."""
        begun, ended = [], []
        for kind, alarm in self._results(inputs):
            before = self._active.pop(kind, None)
            if alarm is not None:
                self._active[kind] = alarm
                if before is None or before.location != alarm.location:
                    begun.append(alarm.message)
            elif before is not None:
                ended.append(f"{RESOLVED}{before.message}")
        return begun + ended

    def _results(self, inputs: AlarmInputs) -> Iterator[tuple[str, _Alarm | None]]:
        """For each kind that is enabled and has figures in ``inputs``: its alarm, None where all is well."""
        config, steps, heads = self._config, inputs.steps, inputs.heads
        if config.alarm_dead_heads is not None and heads is not None:
            loads = self._load.add(steps, [load for layer in heads.relative for load in layer])
            if loads is not None:
                yield "dead", self._dead_heads(heads.routed, loads, config.alarm_dead_heads)
        if config.alarm_entropy is not None and "entropy" in inputs.observed:
            entropies = self._entropy.add(steps, inputs.observed["entropy"])
            if entropies is not None:
                yield "entropy", self._low_entropy(entropies, config.alarm_entropy)
        if config.alarm_balance is not None and inputs.balance_excess is not None:
            excess = self._balance.add(steps, [inputs.balance_excess])
            if excess is not None:
                yield "balance", self._uneven_balance(excess[0], config.alarm_balance)
        self._recent.append(inputs.tokens_per_second)
        if "mfu" not in self._active:  # Otherwise the slow rate would become the usual one and end the alarm.
            self._rates.append(inputs.tokens_per_second)
        if self._largest_drop is not None and len(self._rates) >= 2 * _RECENT:
            yield "mfu", self._rate_drop(self._largest_drop)
        self._busy.append(inputs.busy)
        if self._slow_rank_ratio is not None and len(inputs.busy) > 1 and len(self._busy) == _RECENT:
            yield "slow", self._slow_rank(self._slow_rank_ratio)

    def _dead_heads(self, routed: Sequence[Sequence[int]], loads: Sequence[float], threshold: float) -> _Alarm | None:
        """``loads``: load over fair load of the ``routed`` heads of all layers, one after the other."""
        heads = [(layer, head) for layer, of_layer in enumerate(routed) for head in of_layer]
        dead = [head for head, load in zip(heads, loads, strict=True) if load < threshold]
        if not dead:
            return None
        return _Alarm(
            dead,
            f"dead heads: {_named_heads(dead)} with less than {threshold:g} of the fair load "
            f"(monitor.alarm_dead_heads). Raise {self._balance_key}, or lower optimizer.learning_rate.",
        )

    def _low_entropy(self, entropies: Sequence[float], threshold: float) -> _Alarm | None:
        low = [layer for layer, entropy in enumerate(entropies) if entropy < threshold]
        if not low:
            return None
        return _Alarm(
            low,
            f"entropy collapse: the routers of {_named_layers(low)} are surer than {threshold:g} of an even choice's "
            f"entropy (monitor.alarm_entropy). Raise moh.z_loss_coefficient or {self._balance_key}.",
        )

    def _uneven_balance(self, excess: float, threshold: float) -> _Alarm | None:
        if abs(excess) <= threshold:
            return None
        return _Alarm(
            None,
            f"balance loss out of range: it is {excess:.2f} of the way from an even load to the same heads for every "
            f"token, not within {threshold:g} (monitor.alarm_balance). Raise {self._balance_key}.",
        )

    def _rate_drop(self, drop: float) -> _Alarm | None:
        usual, recent = statistics.median(self._rates), statistics.median(self._recent)
        if recent >= (1 - (drop / 2 if "mfu" in self._active else drop)) * usual:
            return None
        return _Alarm(
            None,
            f"{self._rate_name} drop: {recent:,.0f} tokens a second in the last {_RECENT} intervals, usually "
            f"{usual:,.0f}; more than {drop:.0%} less (monitor.alarm_mfu_drop). "
            "Look at time/ in TensorBoard for the part that grew.",
        )

    def _slow_rank(self, threshold: float) -> _Alarm | None:
        rank, ratio = slowest_over_median([statistics.median(seconds) for seconds in zip(*self._busy, strict=True)])
        # It ends at half of the excess: a rank near the threshold must not raise an alarm again and again.
        least = 1 + (threshold - 1) / 2 if threshold > 1 and "slow" in self._active else threshold
        if not (math.isfinite(ratio) and ratio > least):
            return None
        return _Alarm(
            rank,
            f"slowest rank: rank {rank} takes {ratio:.2f} times the median's time for data and forward pass in the "
            f"last {_RECENT} intervals, more than {threshold:g} (monitor.alarm_slow_rank). Look at its node's disk, "
            "clocks and temperature.",
        )


def _resolve(value: float | Literal["auto"] | None, auto: float | None) -> float | None:
    return auto if value == "auto" else value


def _named_heads(dead: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"layer {layer} head {head}" for layer, head in dead[:_MAX_NAMED])
    return named + (f" and {len(dead) - _MAX_NAMED} more" if len(dead) > _MAX_NAMED else "")


def _named_layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
