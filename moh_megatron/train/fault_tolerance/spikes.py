"""Loss spikes: a loss far above those of the last steps."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable


class SpikeDetector:
    """z-score of a loss over the last ``window`` losses that were told; nothing is a spike until there are so many."""

    def __init__(self, zscore: float | None, window: int, earlier: Iterable[float] = ()) -> None:
        self._zscore = zscore
        self._losses: deque[float] = deque(earlier, window)

    def score(self, loss: float) -> float | None:
        """How many standard deviations ``loss`` lies above the mean, if it is a spike."""
        if self._zscore is None or len(self._losses) < (self._losses.maxlen or 0):
            return None
        mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
        excess = loss - mean
        score = excess / deviation if deviation else math.inf
        return score if excess > 0 and score > self._zscore else None

    def add(self, loss: float) -> None:
        """A loss that the next ones are measured by."""
        if self._zscore is not None and math.isfinite(loss):
            self._losses.append(loss)
