"""Alarms: when they begin, what they name, when they end."""

import math

import pytest
import torch

from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MonitorConfig
from moh_megatron.monitor.alarms import AlarmInputs, Alarms
from moh_megatron.monitor.head_figures import balance_excess, head_figures

LAYERS = [LayerHeads(6, (0, 1), 4)] * 2
TOP_K = [2, 2]
EVEN = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def figures(*load):
    return head_figures(torch.tensor(load), LAYERS, TOP_K, [(0, 1, 2), (3, 4, 5)])


def signs(**changes):
    return AlarmInputs(**{"tokens_per_second": 100.0, "heads": figures(EVEN, EVEN), **changes})


def test_a_healthy_run_is_silent():
    alarms = Alarms(MonitorConfig())
    healthy = signs(observed={"entropy": [0.9, 0.8]}, balance_excess=0.1, busy=[1.0, 1.1])
    assert [alarms.check(healthy) for _ in range(60)] == [[]] * 60


def test_dead_heads_are_named_once_and_again_when_others_die():
    alarms = Alarms(MonitorConfig())
    one = signs(heads=figures(EVEN, [1.0, 1.0, 0.98, 0.98, 0.04, 0.0]))
    two = signs(heads=figures([1.0, 1.0, 1.0, 0.5, 0.5, 0.0], [1.0, 1.0, 0.98, 0.98, 0.04, 0.0]))
    (message,) = alarms.check(one)
    assert message.startswith("dead heads: layer 1 head 4, layer 1 head 5 with less than 0.1 of the fair load")
    assert "monitor.alarm_dead_heads" in message
    assert alarms.check(one) == []
    (message,) = alarms.check(two)
    assert message.startswith("dead heads: layer 0 head 5, layer 1 head 4, layer 1 head 5")
    (message,) = alarms.check(signs())
    assert message.startswith("over: dead heads")
    assert alarms.check(signs()) == []


def test_a_router_that_is_sure():
    (message,) = Alarms(MonitorConfig()).check(signs(observed={"entropy": [0.9, 0.01]}))
    assert message.startswith("entropy collapse: the routers of layer 1 are surer than 0.05")
    assert "monitor.alarm_entropy" in message
    assert Alarms(MonitorConfig()).check(signs(observed={"entropy": [math.nan, 0.5]})) == []


@pytest.mark.parametrize(("excess", "alarmed"), [(0.6, True), (-0.6, True), (0.4, False), (math.nan, True)])
def test_the_balance_loss_is_out_of_range(excess, alarmed):
    messages = Alarms(MonitorConfig()).check(signs(balance_excess=excess))
    assert [message.split(":")[0] for message in messages] == ["balance loss out of range"] * alarmed


def test_the_rate_drops_and_comes_back():
    alarms = Alarms(MonitorConfig())
    assert [alarms.check(signs()) for _ in range(20)] == [[]] * 20
    found = [message for _ in range(5) for message in alarms.check(signs(tokens_per_second=50.0))]
    (message,) = found
    assert message.startswith("MFU drop: 50 tokens a second in the last 5 intervals, usually 100; more than 30% less")
    found = [message for _ in range(5) for message in alarms.check(signs())]
    assert [message.split(":")[0] for message in found] == ["over"]


def test_a_drop_that_lasts_does_not_end_by_itself():
    alarms = Alarms(MonitorConfig())
    rates = [100.0] * 20 + [50.0] * 200
    assert len([message for rate in rates for message in alarms.check(signs(tokens_per_second=rate))]) == 1
    found = [message for _ in range(5) for message in alarms.check(signs())]
    assert [message.split(":")[0] for message in found] == ["over"]


def test_an_interval_that_tells_nothing_about_a_kind_leaves_it_as_it_was():
    alarms = Alarms(MonitorConfig())
    dead = figures(EVEN, [1.0, 1.0, 0.98, 0.98, 0.04, 0.0])
    bad = signs(heads=dead, observed={"entropy": [0.9, 0.01]}, balance_excess=0.9)
    assert len(alarms.check(bad)) == 3
    assert alarms.check(AlarmInputs(100.0)) == [], "a save between two intervals, or skipped steps"
    assert alarms.check(bad) == []
    ended = alarms.check(signs(observed={"entropy": [0.9, 0.9]}, balance_excess=0.0))
    assert [message.split(":")[0] for message in ended] == ["over"] * 3


def test_one_slow_interval_is_no_drop():
    alarms = Alarms(MonitorConfig())
    rates = [100.0] * 20 + [1.0] + [100.0] * 5
    assert [alarms.check(signs(tokens_per_second=rate)) for rate in rates] == [[]] * len(rates)


def test_the_slowest_rank_is_named_when_it_stays_slow():
    alarms, slow = Alarms(MonitorConfig()), signs(busy=[1.0, 1.0, 1.8, 1.0])
    assert [alarms.check(each) for each in (slow, slow, signs(busy=[1.0] * 4), signs(busy=[9.0, 1, 1, 1]))] == [[]] * 4
    (message,) = alarms.check(slow)
    assert message.startswith("slowest rank: rank 2 takes 1.80 times the median's time")
    assert "monitor.alarm_slow_rank" in message


def test_the_remedy_is_the_key_in_use():
    (message,) = Alarms(MonitorConfig(), balance_key="moh.bias_update_rate").check(signs(balance_excess=0.9))
    assert message.endswith("Raise moh.bias_update_rate.")


def test_null_turns_an_alarm_off():
    off = MonitorConfig(
        alarm_dead_heads=None, alarm_entropy=None, alarm_balance=None, alarm_mfu_drop=None, alarm_slow_rank=None
    )
    alarms = Alarms(off)
    dead = figures(EVEN, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    bad = signs(heads=dead, observed={"entropy": [0.0, 0.0]}, balance_excess=1.0, busy=[1.0, 9.0, 1.0])
    assert [alarms.check(bad) for _ in range(20)] == [[]] * 20


@pytest.mark.parametrize(("form", "even", "collapsed"), [("scaled", 2.0, 4.0), ("paper", 0.5, 1.0)])
def test_the_scale_of_the_balance_loss(form, even, collapsed):
    assert balance_excess(even, LAYERS, TOP_K, form) == 0.0
    assert balance_excess(collapsed, LAYERS, TOP_K, form) == 1.0
    assert balance_excess(1.0, [LayerHeads(4, (0, 1), 4)], [2], form) == 0.0
