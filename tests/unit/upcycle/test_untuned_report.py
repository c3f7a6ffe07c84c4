"""Comparisons of the choices of shared heads before any tuning."""

from __future__ import annotations

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.calibrate import Calibration, with_calibrated_heads
from moh_megatron.upcycle.loss_and_kl import mean, measure_loss_and_kl, upcycled_model
from moh_megatron.upcycle.untuned_report import (
    active_heads,
    as_markdown,
    compare_choices,
    compared_shares,
    omissions,
    plan_comparison,
    possible_choices,
    shared_heads,
    with_choice,
)


def test_a_comparison_of_a_dense_configuration_is_refused(tiny):
    with pytest.raises(UserError, match=r"moh\.enabled must be true: .* Got false"):
        plan_comparison(tiny({"moh.enabled": False}), ["first"])
    assert possible_choices(tiny({"moh.shared_heads": 0})) == ["first"]


def test_shares_in_per_cent_become_numbers_of_heads(tiny):
    nine = tiny({"model.num_attention_heads": 9, "model.num_query_groups": 3, "model.hidden_size": 36})
    assert [active_heads(nine, share) for share in (100, 90, 75, 50)] == [9, 8, 7, 5]
    llama = tiny({"model.num_attention_heads": 32, "model.num_query_groups": 8, "model.hidden_size": 64,
                  "moh.shared_heads": 16, "moh.active_heads": 24})  # fmt: skip
    for choice in ("first", "spread", "calibrated"):
        assert [(active_heads(llama, share), shared_heads(llama, share, choice)) for share in (100, 90, 75, 50)] == [
            (32, 16), (29, 16), (24, 16), (16, 8)
        ]  # fmt: skip


def test_compare_choices_gives_a_row_for_each_choice_and_share(tiny, dense, documents):
    config = tiny({"moh.shared_heads": 4, "moh.active_heads": 6, "moh.router": "query_norm"})
    calibration = Calibration(1, 1.0, (tuple(map(float, range(8))),) * 2)
    plan = plan_comparison(config, ["first", "spread", "calibrated"], (100, 75))
    loss, rows = compare_choices(plan, dense, documents, calibration)
    # At 75 % four KV groups have no equal number of active heads.
    assert [(row.scope, row.choice, row.share, row.active, row.shared) for row in rows] == [
        *(
            ("global", choice, share, active, 4)
            for choice in ("first", "spread", "calibrated")
            for share, active in ((100, 8), (75, 6))
        ),
        *(("grouped", choice, 100, 8, 4) for choice in ("spread", "calibrated")),
    ]
    for row in rows:
        assert row.rise.value == pytest.approx(row.loss.value - loss.value, abs=1e-6)
        assert (row.divergence.value < 1e-8) == (row.share == 100)
    assert len({row.loss.value for row in rows if row.share == 75}) == 3
    assert as_markdown(loss, rows).count("\n") == 10


def test_compare_choices_measures_the_choice_within_kv_groups(tiny, grouped, grouped_dense, documents):
    config = tiny({**grouped, "moh.active_heads": 6, "moh.router": "query_norm"})
    # The two heads that matter most are in the second group.
    calibration = Calibration(1, 1.0, (tuple(map(float, range(8))),) * 2)
    plan = plan_comparison(config, ["spread", "calibrated"], (75, 50))
    loss, rows = compare_choices(plan, grouped_dense, documents, calibration)
    by_name = dict(zip(plan, rows, strict=True))
    assert list(by_name) == [
        f"{scope} {choice} {share}"
        for scope in ("global", "grouped")
        for choice in ("spread", "calibrated")
        for share in (75, 50)
    ]
    for row in rows:
        assert row.divergence.value > 1e-3
    shared = with_calibrated_heads(plan["grouped calibrated 75"], calibration).moh.shared_heads
    assert shared == ((3, 7), (3, 7))
    assert with_calibrated_heads(plan["global calibrated 75"], calibration).moh.shared_heads == ((6, 7), (6, 7))
    model = upcycled_model(plan["grouped spread 75"], grouped_dense)
    _, values = measure_loss_and_kl(grouped_dense, {"alone": (model, 6)}, documents)
    assert by_name["grouped spread 75"].loss == mean(values["alone"].losses)
    assert by_name["grouped spread 75"].loss != by_name["global spread 75"].loss
    assert "| grouped | calibrated | 6 (75 %) | 2 |" in as_markdown(loss, rows)


def test_only_budgets_that_divide_evenly_over_the_kv_groups_are_grouped(tiny):
    nine = {"model.num_attention_heads": 9, "model.num_query_groups": 3, "model.hidden_size": 36}
    config = tiny({**nine, "moh.shared_heads": 3, "moh.active_heads": 6, "moh.router": "query_norm"})
    shares = compared_shares(config)
    assert shares == [100, 90, 75, 67, 50]
    assert compared_shares(tiny({**nine, "moh.shared_heads": 3, "moh.active_heads": 7})) == [100, 90, 75, 50]
    assert compared_shares(tiny({"moh.active_heads": [3, 4]})) == [100, 90, 75, 50]
    plan = plan_comparison(config, possible_choices(config), shares)
    assert [name for name in plan if name.startswith("grouped")] == [
        f"grouped {choice} {share}" for choice in ("spread", "calibrated") for share in (100, 67)
    ]
    at_67 = plan["grouped spread 67"].moh
    assert (at_67.routing_groups, at_67.shared_heads, at_67.active_heads) == ("kv", 3, 6)
    assert plan["global spread 67"].moh.routing_groups == 1
    assert omissions(config, plan, possible_choices(config), shares) == [
        "Not grouped, because 3 KV groups need equally many shared and active heads each: "
        "first at 100, 90, 75, 67, 50 %; spread at 90, 75, 50 %; calibrated at 90, 75, 50 %."
    ]
    even, uneven = ([heads] * 2 for heads in ([1, 5, 8], [0, 1, 8]))
    for listed, names in ((even, ["grouped list 100", "grouped list 67"]), (uneven, [])):
        config = tiny({**nine, "moh.shared_heads": listed, "moh.active_heads": 6})
        assert [name for name in plan_comparison(config, ["list"], shares) if name.startswith("grouped")] == names


def test_the_gates_of_a_grouped_configuration_are_kept_for_the_grouped_choice(tiny, grouped):
    config = tiny({**grouped, "moh.gate_softmax": "group"})
    plan = plan_comparison(config, ["spread"], (50,))
    assert {
        name.split()[0]: (variant.moh.routing_groups, variant.moh.gate_softmax) for name, variant in plan.items()
    } == {
        "global": (1, "layer"),
        "grouped": ("kv", "group"),
    }


def test_an_impossible_choice_is_refused(tiny):
    with pytest.raises(UserError, match=r"at 75 %: moh\.shared_heads must be a multiple of the KV groups"):
        with_choice(tiny({"moh.shared_heads": 3, "moh.active_heads": 6}), "spread", 75)
    with pytest.raises(UserError, match=r"--choices list needs moh\.shared_heads to list heads for each layer"):
        with_choice(tiny({"moh.shared_placement": "calibrated"}), "list", 75)


@pytest.mark.parametrize(
    ("heads", "groups", "shared"), [(8, 4, 4), (32, 32, 16)], ids=["as many groups as active heads", "LLaMA 2"]
)
def test_spread_is_left_out_where_no_multiple_of_the_kv_groups_is_left(tiny, heads, groups, shared):
    model = {"model.num_attention_heads": heads, "model.num_query_groups": groups, "model.hidden_size": 4 * heads}
    config = tiny({**model, "moh.shared_heads": shared, "moh.active_heads": shared + heads // 4})
    assert possible_choices(config) == (
        ["first", "calibrated"] if shared % groups else ["first", "spread", "calibrated"]
    )
    plan = plan_comparison(config, possible_choices(config))
    assert all(name.startswith("global") for name in plan if not name.endswith(" 100"))
    at_half = {name.split()[1]: variant.moh for name, variant in plan.items() if name.endswith(" 50")}
    assert {choice: (moh.shared_heads, moh.active_heads) for choice, moh in at_half.items()} == {
        "first": (heads // 2 - 1, heads // 2),
        "calibrated": (heads // 2 - 1, heads // 2),
    }
    listed = tiny({**model, "moh.shared_heads": [list(range(shared))] * 2, "moh.active_heads": shared + 1})
    assert list(plan_comparison(listed, ["list"])) == [f"global list {share}" for share in (100, 90, 75)]


def test_the_choice_list_keeps_the_heads_at_every_share(tiny):
    listed = ((0, 5), (3, 7))
    config = tiny({"moh.shared_heads": [list(heads) for heads in listed], "moh.router": "query_norm"})
    for share, active in ((100, 8), (50, 4)):
        variant = with_choice(config, "list", share)
        assert variant is not None
        assert (variant.moh.shared_heads, variant.moh.active_heads, variant.moh.shared_placement) == (
            listed,
            active,
            "first",
        )
