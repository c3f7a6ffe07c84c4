"""Step metrics in one process: averages, rates, head load. The distributed tests cover several ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from moh_megatron.monitor import accumulator
from moh_megatron.monitor.accumulator import MetricsAccumulator


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when ``now`` is set."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(accumulator.time, "monotonic", lambda: Clock.now)
    return Clock


def scalars(*values):
    return [torch.tensor(value) for value in values]


def routers(*layers):
    """[L, N + 1] float64, as ``HeadStatistics.drain`` gives them."""
    return torch.tensor(layers, dtype=torch.float64)


def test_figures_of_a_dense_model(group, clock):
    metrics = MetricsAccumulator(group, tokens_per_step=64)
    metrics.restart_clock()
    metrics.add(1, 0.1, scalars(2.0, 4.0), torch.tensor(0.5), None)
    metrics.add(2, 0.2, scalars(1.0, 2.0), torch.tensor(0.25), None)
    clock.now += 4.0
    interval = metrics.flush()
    assert interval.head_load is None
    first, second = interval.steps
    assert (first.step, first.tokens, first.lm_loss, first.grad_norm, first.lr) == (1, 64, 3.0, 0.5, 0.1)
    assert (second.step, second.tokens, second.lm_loss, second.grad_norm, second.lr) == (2, 128, 1.5, 0.25, 0.2)
    assert first.balance_loss == second.balance_loss == 0.0
    assert first.tokens_per_second == second.tokens_per_second == 2 * 64 / 4.0


def test_balance_loss_is_a_mean_over_layers_and_head_load_a_share_of_tokens(group):
    metrics = MetricsAccumulator(group, tokens_per_step=10)
    metrics.add(1, 0.1, scalars(1.0), torch.tensor(1.0), routers([10, 4, 6, 1.0], [10, 10, 0, 2.0]))
    metrics.add(2, 0.1, scalars(1.0), torch.tensor(1.0), routers([10, 6, 4, 3.0], [10, 9, 1, 5.0]))
    interval = metrics.flush()
    assert [step.balance_loss for step in interval.steps] == [1.5, 4.0]
    assert interval.head_load is not None
    expected = torch.tensor([[1.0, 0.5, 0.5], [1.0, 0.95, 0.05]], dtype=torch.float64)
    assert_close(interval.head_load, expected, rtol=0, atol=1e-15)


def test_intervals_are_independent(group, clock):
    metrics = MetricsAccumulator(group, tokens_per_step=10)
    metrics.restart_clock()
    metrics.add(1, 0.1, scalars(1.0), torch.tensor(1.0), routers([10, 0, 1.0]))
    clock.now += 1.0
    metrics.flush()
    metrics.add(2, 0.1, scalars(5.0), torch.tensor(2.0), routers([0, 10, 2.0]))
    clock.now += 2.0
    interval = metrics.flush()
    assert [(step.step, step.lm_loss, step.tokens_per_second) for step in interval.steps] == [(2, 5.0, 5.0)]
    assert interval.head_load is not None
    assert interval.head_load.tolist() == [[0.0, 1.0]]


def test_restart_clock_leaves_earlier_time_out_of_the_rate(group, clock):
    metrics = MetricsAccumulator(group, tokens_per_step=10)
    clock.now += 1000.0
    metrics.restart_clock()
    metrics.add(1, 0.1, scalars(1.0), torch.tensor(1.0), None)
    clock.now += 2.0
    assert metrics.flush().steps[0].tokens_per_second == 5.0


def test_flush_without_steps_is_empty(group):
    interval = MetricsAccumulator(group, tokens_per_step=10).flush()
    assert interval.steps == []
    assert interval.head_load is None


def test_large_counts_and_losses_are_not_rounded(group):
    tokens = 2**24 + 1
    metrics = MetricsAccumulator(group, tokens_per_step=tokens)
    metrics.add(3, 0.1, scalars(1.0, 1.0 + 2**-23), torch.tensor(1.0), routers([tokens, tokens - 1, 1.0]))
    interval = metrics.flush()
    assert interval.steps[0].tokens == 3 * tokens
    assert interval.head_load is not None
    assert interval.head_load.tolist() == [[1.0, (tokens - 1) / tokens]]


def test_bf16_losses_are_averaged_in_higher_precision(group):
    metrics = MetricsAccumulator(group, tokens_per_step=1)
    losses = [torch.tensor(value, dtype=torch.bfloat16) for value in (4.0, 4.03125)]
    metrics.add(1, 0.1, losses, torch.tensor(1.0), None)
    assert metrics.flush().steps[0].lm_loss == 4.015625


def test_heads_of_a_skipped_step_are_not_counted(group):
    metrics = MetricsAccumulator(group, tokens_per_step=4)
    metrics.add(1, 0.1, scalars(2.0), torch.tensor(1.0), routers([4, 0, 0.5]))
    metrics.add(2, 0.1, scalars(math.nan), torch.tensor(math.inf), routers([1, 3, math.nan]), skipped=True)
    interval = metrics.flush()
    assert [step.skipped for step in interval.steps] == [False, True]
    assert interval.steps[0].lm_loss == 2.0
    assert math.isnan(interval.steps[1].lm_loss)
    assert_close(interval.head_load, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_an_interval_of_skipped_steps_has_no_head_load(group):
    metrics = MetricsAccumulator(group, tokens_per_step=4)
    metrics.add(1, 0.1, scalars(math.nan), torch.tensor(math.inf), routers([1, 3, math.nan]), skipped=True)
    assert metrics.flush().head_load is None
