"""Alarms: when they begin, what they name, and when they end."""

import math

import pytest
import torch

from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.schema import MonitorConfig
from moh_megatron.moh.losses import balance_loss
from moh_megatron.monitor.alarms import AlarmInputs, Alarms
from moh_megatron.monitor.head_figures import balance_excess, head_figures, heat_map

LAYERS = [LayerHeads(6, (0, 1), 4)] * 2
TOP_K = [2, 2]
EVEN = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


AT_ONCE = MonitorConfig(alarm_steps=1)
"""With this configuration every step is judged by itself."""
DYING = [1.0, 1.0, 0.98, 0.98, 0.04, 0.0]


def figures(*load):
    return head_figures(torch.tensor(load), LAYERS, TOP_K, [(0, 1, 2), (3, 4, 5)])


def inputs(**changes):
    return AlarmInputs(**{"tokens_per_second": 100.0, "heads": figures(EVEN, EVEN), **changes})


def test_a_healthy_run_is_silent():
    alarms = Alarms(MonitorConfig())
    healthy = inputs(observed={"entropy": [0.9, 0.8]}, balance_excess=0.1, busy=[1.0, 1.1])
    assert [alarms.check(healthy) for _ in range(60)] == [[]] * 60


def test_dead_heads_are_named_once_and_again_when_others_die():
    alarms = Alarms(AT_ONCE)
    one = inputs(heads=figures(EVEN, DYING))
    two = inputs(heads=figures([1.0, 1.0, 1.0, 0.5, 0.5, 0.0], DYING))
    (message,) = alarms.check(one)
    assert message.startswith("dead heads: layer 1 head 4, layer 1 head 5 with less than 0.1 of the fair load")
    assert "monitor.alarm_dead_heads" in message
    assert alarms.check(one) == []
    (message,) = alarms.check(two)
    assert message.startswith("dead heads: layer 0 head 5, layer 1 head 4, layer 1 head 5")
    (message,) = alarms.check(inputs())
    assert message.startswith("resolved: dead heads")
    assert alarms.check(inputs()) == []


ROUTING_ALARMS = {"dead heads", "entropy collapse", "balance loss out of range"}


def kinds(messages):
    return {message.split(":")[0] for message in messages}


@pytest.mark.parametrize("steps_of_an_interval", [1, 7, 10, 50, 100])
def test_alarms_about_routing_need_fifty_steps(steps_of_an_interval):
    """A run of a few steps is no evidence, however its intervals divide it."""
    alarms = Alarms(MonitorConfig())
    bad = inputs(
        steps=steps_of_an_interval,
        heads=figures(EVEN, DYING),
        observed={"entropy": [0.9, 0.01]},
        balance_excess=0.9,
    )
    intervals = math.ceil(50 / steps_of_an_interval)
    assert [alarms.check(bad) for _ in range(intervals - 1)] == [[]] * (intervals - 1)
    assert kinds(alarms.check(bad)) == ROUTING_ALARMS


def test_routing_that_is_bad_for_a_moment_raises_no_alarm():
    """The load of the first steps of a run, and single steps later, are not the mean of fifty."""
    alarms = Alarms(MonitorConfig())
    bad = inputs(heads=figures(DYING, DYING), observed={"entropy": [0.01, 0.01]}, balance_excess=0.9)
    good = inputs(observed={"entropy": [0.9, 0.9]}, balance_excess=0.1)
    intervals = [*[bad] * 20, *[good] * 80, *[bad] * 5, *[good] * 80]
    assert [alarms.check(interval) for interval in intervals] == [[]] * len(intervals)


def test_intervals_count_by_their_steps():
    """Means weigh each interval with its steps, and the newest intervals that have fifty steps together are judged."""
    alarms = Alarms(MonitorConfig(alarm_balance=0.5))
    assert kinds(alarms.check(inputs(steps=40, balance_excess=0.7))) == set()
    assert kinds(alarms.check(inputs(steps=20, balance_excess=0.2))) == {"balance loss out of range"}, "(28 + 4) / 60"
    (message,) = alarms.check(inputs(steps=20, balance_excess=0.2))
    assert message.startswith("resolved: "), "(28 + 4 + 4) / 80"
    assert alarms.check(inputs(steps=20, balance_excess=0.9)) == [], "of the last three alone: (4 + 4 + 18) / 60"


def test_low_entropy_raises_an_alarm():
    (message,) = Alarms(AT_ONCE).check(inputs(observed={"entropy": [0.9, 0.01]}))
    assert message.startswith("entropy collapse: the routers of layer 1 are surer than 0.05")
    assert "monitor.alarm_entropy" in message
    assert Alarms(AT_ONCE).check(inputs(observed={"entropy": [math.nan, 0.5]})) == []


@pytest.mark.parametrize(("excess", "alarmed"), [(0.6, True), (-0.6, True), (0.4, False), (math.nan, True)])
def test_balance_loss_out_of_range_raises_an_alarm(excess, alarmed):
    messages = Alarms(AT_ONCE).check(inputs(balance_excess=excess))
    assert [message.split(":")[0] for message in messages] == ["balance loss out of range"] * alarmed


def test_a_rate_drop_raises_an_alarm_that_ends_when_the_rate_recovers():
    alarms = Alarms(MonitorConfig())
    assert [alarms.check(inputs()) for _ in range(20)] == [[]] * 20
    found = [message for _ in range(5) for message in alarms.check(inputs(tokens_per_second=50.0))]
    (message,) = found
    assert message.startswith("MFU drop: 50 tokens a second in the last 5 intervals, usually 100; more than 30% less")
    found = [message for _ in range(5) for message in alarms.check(inputs())]
    assert [message.split(":")[0] for message in found] == ["resolved"]


def test_a_rate_near_the_threshold_raises_one_alarm_that_lasts_until_half_of_the_drop_is_made_up_for():
    alarms = Alarms(MonitorConfig(alarm_mfu_drop=0.3))
    rates = [100.0] * 20 + [65.0] * 5 + [75.0, 75.0, 75.0, 65.0, 65.0, 65.0] * 10 + [90.0] * 5
    messages = [message.split(",")[0] for rate in rates for message in alarms.check(inputs(tokens_per_second=rate))]
    assert [message.split(":")[0] for message in messages] == ["MFU drop", "resolved"]


def test_a_run_without_an_accelerator_has_alarms_about_time_by_key_only():
    late = [*[inputs(busy=[1.0, 1.0])] * 20, *[inputs(tokens_per_second=10.0, busy=[1.0, 9.0])] * 10]
    by_itself = Alarms(MonitorConfig(), accelerator=False, mfu=False)
    assert [message for interval in late for message in by_itself.check(interval)] == []
    by_key = Alarms(MonitorConfig(alarm_mfu_drop=0.3, alarm_slow_rank=1.5), accelerator=False, mfu=False)
    found = [message for interval in late for message in by_key.check(interval)]
    assert sorted(message.split(" tokens a second")[0] for message in found if "drop" in message) == ["speed drop: 10"]
    assert any(message.startswith("slowest rank: rank 1 takes 9.00 times") for message in found)


def test_a_rank_near_the_threshold_raises_one_alarm():
    alarms = Alarms(MonitorConfig(alarm_slow_rank=1.5))
    ratios = [1.6] * 5 + [1.4, 1.4, 1.4, 1.6, 1.6, 1.6] * 5 + [1.0] * 5
    messages = [message for ratio in ratios for message in alarms.check(inputs(busy=[1.0, ratio, 1.0]))]
    assert [message.split(":")[0] for message in messages] == ["slowest rank", "resolved"]


def test_a_lasting_rate_drop_does_not_become_the_usual_rate():
    alarms = Alarms(MonitorConfig())
    rates = [100.0] * 20 + [50.0] * 200
    assert len([message for rate in rates for message in alarms.check(inputs(tokens_per_second=rate))]) == 1
    found = [message for _ in range(5) for message in alarms.check(inputs())]
    assert [message.split(":")[0] for message in found] == ["resolved"]


def test_an_interval_without_figures_leaves_an_alarm_as_it_was():
    alarms = Alarms(AT_ONCE)
    dead = figures(EVEN, DYING)
    bad = inputs(heads=dead, observed={"entropy": [0.9, 0.01]}, balance_excess=0.9)
    assert len(alarms.check(bad)) == 3
    assert alarms.check(AlarmInputs(100.0)) == [], "as after skipped steps"
    assert alarms.check(bad) == []
    ended = alarms.check(inputs(observed={"entropy": [0.9, 0.9]}, balance_excess=0.0))
    assert [message.split(":")[0] for message in ended] == ["resolved"] * 3


def test_one_slow_interval_raises_no_alarm():
    alarms = Alarms(MonitorConfig())
    rates = [100.0] * 20 + [1.0] + [100.0] * 5
    assert [alarms.check(inputs(tokens_per_second=rate)) for rate in rates] == [[]] * len(rates)


def test_a_rank_that_stays_slow_is_named():
    alarms, slow = Alarms(MonitorConfig()), inputs(busy=[1.0, 1.0, 1.8, 1.0])
    assert [
        alarms.check(interval) for interval in (slow, slow, inputs(busy=[1.0] * 4), inputs(busy=[9.0, 1, 1, 1]))
    ] == [[]] * 4
    (message,) = alarms.check(slow)
    assert message.startswith("slowest rank: rank 2 takes 1.80 times the median's time")
    assert "monitor.alarm_slow_rank" in message


def test_the_message_names_the_balance_key_in_use():
    (message,) = Alarms(AT_ONCE, balance_key="moh.bias_update_rate").check(inputs(balance_excess=0.9))
    assert message.endswith("Raise moh.bias_update_rate.")


def test_null_disables_an_alarm():
    off = MonitorConfig(
        alarm_dead_heads=None, alarm_entropy=None, alarm_balance=None, alarm_mfu_drop=None, alarm_slow_rank=None
    )
    alarms = Alarms(off)
    dead = figures(EVEN, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    bad = inputs(heads=dead, observed={"entropy": [0.0, 0.0]}, balance_excess=1.0, busy=[1.0, 9.0, 1.0])
    assert [alarms.check(bad) for _ in range(20)] == [[]] * 20


@pytest.mark.parametrize(("form", "even", "collapsed"), [("scaled", 2.0, 4.0), ("paper", 0.5, 1.0)])
def test_balance_excess_is_0_for_an_even_and_1_for_a_collapsed_load(form, even, collapsed):
    assert balance_excess(even, LAYERS, TOP_K, form) == 0.0
    assert balance_excess(collapsed, LAYERS, TOP_K, form) == 1.0
    assert balance_excess(1.0, [LayerHeads(4, (0, 1), 4)], [2], form) == 0.0


GROUPED = LayerHeads(8, (0, 4), 6, groups=2)
"""Two groups of four heads with one shared head and two of three routed ones each."""


@pytest.mark.parametrize("form", ["scaled", "paper"])
def test_balance_excess_in_groups_is_0_for_an_even_and_1_for_a_collapsed_load(form):
    def loss(probability, load):
        return float(balance_loss(torch.tensor(probability), torch.tensor(load), form, 2))

    even = loss([1 / 3] * 6, [2 / 3] * 6)
    collapsed = loss([1.0, 0.0, 0.0] * 2, [1.0, 1.0, 0.0] * 2)
    half = loss([1 / 3] * 3 + [1.0, 0.0, 0.0], [2 / 3] * 3 + [1.0, 1.0, 0.0])
    assert [balance_excess(value, [GROUPED], [4], form) for value in (even, half, collapsed)] == pytest.approx(
        [0.0, 0.5, 1.0], abs=1e-6
    )


def test_figures_of_heads_are_those_of_their_groups():
    load = [1.0, 0.7, 0.7, 0.6, 1.0, 1.0, 0.96, 0.04]
    found = head_figures(torch.tensor([load]), [GROUPED], [4], [(0, 1, 2, 3), (4, 5, 6, 7)])
    shares = [[0.35, 0.35, 0.3], [0.5, 0.48, 0.02]]
    evenness = [-sum(share * math.log(share) for share in group) / math.log(3) for group in shares]
    assert found.load_entropy == pytest.approx([sum(evenness) / 2], rel=1e-6)
    assert found.relative[0] == pytest.approx([1.05, 1.05, 0.9, 1.5, 1.44, 0.06], rel=1e-5)
    assert found.rank_imbalance == pytest.approx([1.0], rel=1e-6), "each group has three heads of a token"
    (message,) = Alarms(AT_ONCE).check(inputs(heads=found))
    assert message.startswith("dead heads: layer 0 head 7 with less than 0.1 of the fair load")


def test_a_head_map_separates_groups():
    picture = heat_map(torch.ones(1, 8), 2)[..., 0]
    assert (picture[6, 47:50] == 128).all()
    assert (picture[6, [46, 50]] == 0).all()
    assert int((heat_map(torch.ones(1, 8))[6] == 128).sum()) == 8
