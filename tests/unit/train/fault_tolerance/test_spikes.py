"""What counts as a loss spike."""

import math

import pytest

from moh_megatron.train.fault_tolerance.spikes import SpikeDetector

WINDOW = [4.0, 4.2, 3.8, 4.1, 3.9]


def test_z_score_over_the_window():
    detector = SpikeDetector(3.0, 5, WINDOW)
    mean, deviation = 4.0, math.sqrt(0.02)
    assert detector.score(mean + 2.9 * deviation) is None
    assert detector.score(mean + 3.1 * deviation) == pytest.approx(3.1)
    assert detector.score(mean - 9 * deviation) is None, "a fall is no spike"


def test_nothing_is_a_spike_before_the_window_is_full():
    detector = SpikeDetector(3.0, 5, WINDOW[:4])
    assert detector.score(100.0) is None
    detector.add(4.0)
    assert detector.score(100.0) is not None


def test_old_losses_leave_the_window_and_infinite_ones_never_enter():
    detector = SpikeDetector(3.0, 5, WINDOW)
    for _ in range(5):
        detector.add(9.0)
    detector.add(math.nan)
    detector.add(math.inf)
    assert detector.score(9.0) is None
    assert detector.score(9.1) == math.inf, "all the same before"


def test_turned_off():
    detector = SpikeDetector(None, 5, WINDOW)
    assert detector.score(1e9) is None
