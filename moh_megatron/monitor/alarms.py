"""What a loss curve does not show, told when it begins and when it ends. Every threshold is a key of ``monitor``."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moh_megatron.config.schema import MonitorConfig
from moh_megatron.monitor.board import slowest_over_median
from moh_megatron.monitor.heads import HeadFigures

OVER = "over: "
"""How a message about an alarm that has ended starts."""
_NAMED = 6
_RATES, _RECENT = 50, 5
"""Intervals that the usual rate is the median of, and those that are held against it."""


@dataclass(frozen=True)
class Signs:
    """What an interval showed."""

    tokens_per_second: float
    heads: HeadFigures | None = None
    observed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    balance_excess: float | None = None
    """As ``heads.balance_excess``."""
    busy: Sequence[float] = ()
    """As ``Vitals.busy``."""


class Alarms:
    """Holds each interval against the thresholds; ``balance_key`` is what the user raises for a more even load."""

    def __init__(self, config: MonitorConfig, balance_key: str = "moh.balance_coefficient") -> None:
        self._config = config
        self._balance_key = balance_key
        self._active: dict[str, tuple[object, str]] = {}
        self._rates: deque[float] = deque(maxlen=_RATES)
        self._busy: deque[Sequence[float]] = deque(maxlen=_RECENT)

    def check(self, signs: Signs) -> list[str]:
        """What has begun, changed or ended with this interval; nothing about what goes on as it was."""
        now = {kind: (where, message) for kind, where, message in self._found(signs)}
        before, self._active = self._active, now
        messages = [message for kind, (where, message) in now.items() if kind not in before or before[kind][0] != where]
        return messages + [f"{OVER}{message}" for kind, (_, message) in before.items() if kind not in now]

    def _found(self, signs: Signs) -> Iterator[tuple[str, object, str]]:
        """(kind, where, message) of all that is wrong."""
        config = self._config
        if config.alarm_dead_heads is not None and signs.heads is not None:
            dead = signs.heads.below(config.alarm_dead_heads)
            if dead:
                yield (
                    "dead",
                    dead,
                    f"dead heads: {_places(dead)} with less than {config.alarm_dead_heads:g} of the fair load "
                    f"(monitor.alarm_dead_heads). Raise {self._balance_key}, or lower optimizer.learning_rate.",
                )
        if config.alarm_entropy is not None:
            entropies = list(enumerate(signs.observed.get("entropy", ())))
            low = [layer for layer, entropy in entropies if entropy < config.alarm_entropy]
            if low:
                yield (
                    "entropy",
                    low,
                    f"entropy collapse: the routers of {_layers(low)} are surer than {config.alarm_entropy:g} of an "
                    "even choice's entropy (monitor.alarm_entropy). Raise moh.z_loss_coefficient or "
                    f"{self._balance_key}.",
                )
        excess = signs.balance_excess
        if config.alarm_balance is not None and excess is not None and not abs(excess) <= config.alarm_balance:
            yield (
                "balance",
                None,
                f"balance loss out of range: it is {excess:.2f} of the way from an even load to the same heads for "
                f"every token, not within {config.alarm_balance:g} (monitor.alarm_balance). Raise "
                f"{self._balance_key}.",
            )
        yield from self._slow(signs)

    def _slow(self, signs: Signs) -> Iterator[tuple[str, object, str]]:
        config = self._config
        self._rates.append(signs.tokens_per_second)
        if config.alarm_mfu_drop is not None and len(self._rates) >= 2 * _RECENT:
            rates = list(self._rates)
            usual, recent = statistics.median(rates), statistics.median(rates[-_RECENT:])
            if recent < (1 - config.alarm_mfu_drop) * usual:
                yield (
                    "mfu",
                    None,
                    f"MFU drop: {recent:,.0f} tokens a second in the last {_RECENT} intervals, usually {usual:,.0f}; "
                    f"more than {config.alarm_mfu_drop:.0%} less (monitor.alarm_mfu_drop). Look at time/ in "
                    "TensorBoard for the part that grew.",
                )
        self._busy.append(signs.busy)
        if config.alarm_slow_rank is not None and len(signs.busy) > 1 and len(self._busy) == _RECENT:
            rank, ratio = slowest_over_median([statistics.median(each) for each in zip(*self._busy, strict=True)])
            if math.isfinite(ratio) and ratio > config.alarm_slow_rank:
                yield (
                    "slow",
                    rank,
                    f"slowest rank: rank {rank} takes {ratio:.2f} times the median's time for data and forward pass in "
                    f"the last {_RECENT} intervals, more than {config.alarm_slow_rank:g} (monitor.alarm_slow_rank). "
                    "Look at its node's disk, clocks and temperature.",
                )


def _places(dead: Sequence[tuple[int, int]]) -> str:
    named = ", ".join(f"layer {layer} head {head}" for layer, head in dead[:_NAMED])
    return named + (f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else "")


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
