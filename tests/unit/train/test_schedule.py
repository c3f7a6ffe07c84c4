"""The shapes of learning-rate schedules: values at the corners, and closed forms between them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.config.schema import OptimizerConfig
from moh_megatron.train.schedule import learning_rate

SHAPES = ["cosine", "linear", "wsd", "constant"]


def optimizer(schedule="cosine", **values):
    return OptimizerConfig(
        **{"learning_rate": 1.0, "min_learning_rate": 0.1, "schedule": schedule, "decay_fraction": 0.2} | values
    )


def curve(settings, total):
    return [learning_rate(settings, step, total) for step in range(total)]


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_rises_in_equal_steps_to_the_peak(shape):
    rates = curve(optimizer(shape, warmup_steps=4, warmup_learning_rate=0.5), 20)
    assert rates[:5] == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warm_up_the_first_step_has_the_peak(shape):
    assert learning_rate(optimizer(shape), 0, 20) == 1.0


@pytest.mark.parametrize(("shape", "last"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
@pytest.mark.parametrize("warmup", [0, 4, 18])
def test_the_last_step_has_the_final_rate(shape, last, warmup):
    assert learning_rate(optimizer(shape, warmup_steps=warmup), 19, 20) == pytest.approx(last)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_of_one_step_has_the_peak(shape):
    assert curve(optimizer(shape, min_learning_rate=0.0), 1) == [1.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_warm_up_that_leaves_one_step_ends_at_the_peak(shape):
    assert curve(optimizer(shape, warmup_steps=3), 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_is_half_way_down_in_the_middle():
    rates = curve(optimizer("cosine", warmup_steps=2), 13)
    assert rates[7] == pytest.approx(0.55)
    assert rates[2:] == pytest.approx([0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(11)])


def test_linear_falls_in_equal_steps():
    assert curve(optimizer("linear", warmup_steps=2), 12)[2:] == pytest.approx([1 - 0.1 * i for i in range(10)])


def test_wsd_is_constant_and_then_falls_in_equal_steps():
    rates = curve(optimizer("wsd", warmup_steps=2), 20)
    assert rates[2:16] == [1.0] * 14
    assert rates[16:] == pytest.approx([0.775, 0.55, 0.325, 0.1])


def test_wsd_decays_within_a_single_step():
    assert curve(optimizer("wsd", decay_fraction=0.1), 10) == pytest.approx([1.0] * 9 + [0.1])


def test_wsd_decay_starts_after_the_warm_up():
    rates = curve(optimizer("wsd", warmup_steps=5, decay_fraction=1.0), 10)
    assert rates[5:] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])


def test_a_step_beyond_the_last_keeps_the_final_rate():
    for shape in ("cosine", "linear", "wsd"):
        assert learning_rate(optimizer(shape), 35, 20) == pytest.approx(0.1)


@given(
    shape=st.sampled_from(SHAPES),
    total=st.integers(1, 200),
    warmup=st.integers(0, 199),
    start=st.floats(0, 1),
    final=st.floats(0, 1),
    fraction=st.floats(0.01, 1),
)
def test_schedule_rises_to_the_peak_then_never_rises_and_stays_in_bounds(shape, total, warmup, start, final, fraction):
    warmup = min(warmup, total - 1)
    rates = curve(
        optimizer(
            shape,
            warmup_steps=warmup,
            warmup_learning_rate=start,
            min_learning_rate=final,
            decay_fraction=fraction,
        ),
        total,
    )
    slack = 1e-12
    assert rates[warmup] == pytest.approx(1.0)
    assert all(a <= b + slack for a, b in pairwise(rates[: warmup + 1]))
    assert all(a + slack >= b for a, b in pairwise(rates[warmup:]))
    assert min(rates[:warmup], default=1.0) >= start - slack
    assert min(rates[warmup:]) >= min(final, 1.0) - slack
    if warmup < total - 1 and shape != "constant":
        assert rates[-1] == pytest.approx(final)
