"""A violation of a configuration rule, and the nearest values that would satisfy it."""

from __future__ import annotations

import math
from typing import NamedTuple


class Violation(NamedTuple):
    key: str
    """The key to change, ``section.key``."""
    message: str


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of ``divisor`` on both sides of ``value``."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below > 0 else str(divisor)


def nearest_divisors(value: int, number: int) -> str:
    """The divisors of ``number`` on both sides of ``value``."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    divisors = sorted({*small, *(number // divisor for divisor in small)})
    below = [divisor for divisor in divisors if divisor < value][-1:]
    above = [divisor for divisor in divisors if divisor > value][:1]
    return " or ".join(map(str, below + above))
