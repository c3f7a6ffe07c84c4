"""Head counts and balance losses of one layer over micro-batches."""

import torch

from moh_megatron.moh.routing import Routing
from moh_megatron.moh.statistics import HeadStatistics

CPU = torch.device("cpu")


def routing(active, balance):
    mask = torch.tensor(active)
    return Routing(mask.float(), mask, torch.tensor(balance, requires_grad=True))


def test_statistics_add_counts_and_average_balance_losses():
    statistics = HeadStatistics(3)
    statistics.record(routing([[[True, False, True]], [[True, True, False]]], 1.0))
    statistics.record(routing([[[True, False, True]], [[True, False, False]]], 2.0))
    drained = statistics.drain(CPU)
    assert drained.dtype == torch.float64
    assert not drained.requires_grad
    assert drained.tolist() == [4.0, 1.0, 2.0, 1.5]


def test_drain_resets_the_statistics():
    statistics = HeadStatistics(2)
    statistics.record(routing([[[True, False]]], 1.0))
    statistics.drain(CPU)
    assert statistics.drain(CPU).tolist() == [0.0, 0.0, 0.0]
    statistics.record(routing([[[False, True]]], 3.0))
    assert statistics.drain(CPU).tolist() == [0.0, 1.0, 3.0]


def test_statistics_count_many_tokens_exactly():
    statistics = HeadStatistics(1)
    many = routing([True], 0.0)._replace(active=torch.ones(2**12, 2**12, 1, dtype=torch.bool))
    statistics.record(many)
    statistics.record(routing([[[True]]], 0.0))
    assert statistics.drain(CPU)[0] == 2**24 + 1
