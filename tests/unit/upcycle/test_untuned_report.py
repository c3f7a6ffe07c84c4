"""Comparisons of the choices of shared heads before any tuning."""

from __future__ import annotations

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.calibrate import Calibration
from moh_megatron.upcycle.untuned_report import (
    active_heads,
    as_markdown,
    compare_choices,
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
    assert [(row.choice, row.share, row.active, row.shared) for row in rows] == [
        (choice, share, active, 4)
        for choice in ("first", "spread", "calibrated")
        for share, active in ((100, 8), (75, 6))
    ]
    for row in rows:
        assert row.rise.value == pytest.approx(row.loss.value - loss.value, abs=1e-6)
        assert (row.divergence.value < 1e-8) == (row.share == 100)
    assert len({row.loss.value for row in rows if row.share == 75}) == 3
    assert as_markdown(loss, rows).count("\n") == 8


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
    at_half = {name.split()[0]: variant.moh for name, variant in plan.items() if name.endswith(" 50")}
    assert {choice: (moh.shared_heads, moh.active_heads) for choice, moh in at_half.items()} == {
        "first": (heads // 2 - 1, heads // 2),
        "calibrated": (heads // 2 - 1, heads // 2),
    }
    listed = tiny({**model, "moh.shared_heads": [list(range(shared))] * 2, "moh.active_heads": shared + 1})
    assert [name.split()[1] for name in plan_comparison(listed, ["list"])] == ["100", "90", "75"]


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
