"""What a loss curve does not show, told when it begins and when it ends. Every threshold is a key of ``monitor``."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moh_megatron.config.schema import MonitorConfig
from moh_megatron.monitor.head_figures import HeadFigures
from moh_megatron.monitor.metrics_logger import slowest_over_median

OVER = "over: "
"""How a message about an alarm that has ended starts."""
_NAMED = 6
_RATES, _RECENT = 50, 5
"""Intervals that the usual rate is the median of, and those that are held against it."""


@dataclass(frozen=True)
class AlarmInputs:
    """What an interval showed."""

    tokens_per_second: float
    heads: HeadFigures | None = None
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    balance_excess: float | None = None
    """As ``heads.balance_excess``."""
    busy: Sequence[float] = ()
    """As ``IntervalStats.busy``."""


@dataclass(frozen=True)
class _Alarm:
    where: object
    """Whose: another means the alarm has changed."""
    message: str


class Alarms:
    """Holds each interval against the thresholds; ``balance_key`` is what the user raises for a more even load.

    A kind about which an interval tells nothing stays as it was.
    """

    def __init__(self, config: MonitorConfig, balance_key: str = "moh.balance_coefficient") -> None:
        self._config = config
        self._balance_key = balance_key
        self._active: dict[str, _Alarm] = {}
        self._rates: deque[float] = deque(maxlen=_RATES)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._busy: deque[Sequence[float]] = deque(maxlen=_RECENT)

    def check(self, signs: AlarmInputs) -> list[str]:
        """What has begun, changed or ended with this interval; nothing about what goes on as it was."""
        begun, ended = [], []
        for kind, alarm in self._judged(signs):
            before = self._active.pop(kind, None)
            if alarm is not None:
                self._active[kind] = alarm
                if before is None or before.where != alarm.where:
                    begun.append(alarm.message)
            elif before is not None:
                ended.append(f"{OVER}{before.message}")
        return begun + ended

    def _judged(self, signs: AlarmInputs) -> Iterator[tuple[str, _Alarm | None]]:
        """Each kind that is watched and that ``signs`` tell about: what is wrong, None where nothing is."""
        config = self._config
        if config.alarm_dead_heads is not None and signs.heads is not None:
            yield "dead", self._dead(signs.heads, config.alarm_dead_heads)
        if config.alarm_entropy is not None and "entropy" in signs.observed:
            yield "entropy", self._sure(signs.observed["entropy"], config.alarm_entropy)
        if config.alarm_balance is not None and signs.balance_excess is not None:
            yield "balance", self._uneven(signs.balance_excess, config.alarm_balance)
        self._recent.append(signs.tokens_per_second)
        if "mfu" not in self._active:  # or what is slow would become usual, and the alarm end by itself
            self._rates.append(signs.tokens_per_second)
        if config.alarm_mfu_drop is not None and len(self._rates) >= 2 * _RECENT:
            yield "mfu", self._slow(config.alarm_mfu_drop)
        self._busy.append(signs.busy)
        if config.alarm_slow_rank is not None and len(signs.busy) > 1 and len(self._busy) == _RECENT:
            yield "slow", self._slowest(config.alarm_slow_rank)

    def _dead(self, heads: HeadFigures, threshold: float) -> _Alarm | None:
        dead = heads.below(threshold)
        if not dead:
            return None
        return _Alarm(
            dead,
            f"dead heads: {_places(dead)} with less than {threshold:g} of the fair load (monitor.alarm_dead_heads). "
            f"Raise {self._balance_key}, or lower optimizer.learning_rate.",
        )

    def _sure(self, entropies: Sequence[float], threshold: float) -> _Alarm | None:
        low = [layer for layer, entropy in enumerate(entropies) if entropy < threshold]
        if not low:
            return None
        return _Alarm(
            low,
            f"entropy collapse: the routers of {_layers(low)} are surer than {threshold:g} of an even choice's entropy "
            f"(monitor.alarm_entropy). Raise moh.z_loss_coefficient or {self._balance_key}.",
        )

    def _uneven(self, excess: float, threshold: float) -> _Alarm | None:
        if abs(excess) <= threshold:
            return None
        return _Alarm(
            None,
            f"balance loss out of range: it is {excess:.2f} of the way from an even load to the same heads for every "
            f"token, not within {threshold:g} (monitor.alarm_balance). Raise {self._balance_key}.",
        )

    def _slow(self, drop: float) -> _Alarm | None:
        usual, recent = statistics.median(self._rates), statistics.median(self._recent)
        if recent >= (1 - drop) * usual:
            return None
        return _Alarm(
            None,
            f"MFU drop: {recent:,.0f} tokens a second in the last {_RECENT} intervals, usually {usual:,.0f}; more than "
            f"{drop:.0%} less (monitor.alarm_mfu_drop). Look at time/ in TensorBoard for the part that grew.",
        )

    def _slowest(self, threshold: float) -> _Alarm | None:
        rank, ratio = slowest_over_median([statistics.median(each) for each in zip(*self._busy, strict=True)])
        if not (math.isfinite(ratio) and ratio > threshold):
            return None
        return _Alarm(
            rank,
            f"slowest rank: rank {rank} takes {ratio:.2f} times the median's time for data and forward pass in the "
            f"last {_RECENT} intervals, more than {threshold:g} (monitor.alarm_slow_rank). Look at its node's disk, "
            "clocks and temperature.",
        )


def _places(dead: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"layer {layer} head {head}" for layer, head in dead[:_NAMED])
    return named + (f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else "")


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
