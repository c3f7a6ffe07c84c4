"""A rule that a configuration breaks, and what would be near enough."""

from __future__ import annotations

import math
from typing import NamedTuple


class Violation(NamedTuple):
    key: str
    """The key to mend, ``section.key``."""
    message: str


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of ``divisor`` on both sides of ``value``."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below > 0 else str(divisor)


def nearest_divisors(value: int, of: int) -> str:
    """The divisors of ``of`` on both sides of ``value``."""
    small = [each for each in range(1, math.isqrt(of) + 1) if of % each == 0]
    divisors = sorted({*small, *(of // each for each in small)})
    below = [each for each in divisors if each < value][-1:]
    above = [each for each in divisors if each > value][:1]
    return " or ".join(map(str, below + above))
