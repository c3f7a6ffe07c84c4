"""The heads that each layer shares and uses, and the settings that are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.config.layer_heads import LayerHeads, active_share, layer_heads
from moh_megatron.config.load import config_from_mapping, dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError


def heads(config: Config) -> tuple[LayerHeads, ...]:
    return layer_heads(config.model, config.moh)


def test_number_of_shared_heads_means_the_first_of_every_layer(configure):
    assert heads(configure()) == (LayerHeads(8, (0, 1), 4),) * 2
    assert heads(configure())[0].routed == (2, 3, 4, 5, 6, 7)
    assert heads(configure())[0].top_k == 2


def test_dense_model_uses_every_head(configure):
    config = configure({"moh.enabled": False, "moh.shared_heads": None, "moh.active_heads": None})
    assert [layer.active for layer in heads(config)] == [8, 8]
    assert active_share(config.model, config.moh) == 1.0


def test_spread_places_equally_many_shared_heads_in_each_group(configure):
    config = configure({"model.num_query_groups": 2, "moh.shared_placement": "spread", "moh.shared_heads": 4,
                        "moh.active_heads": 6})  # fmt: skip
    assert heads(config)[0].shared == (0, 1, 4, 5)
    assert heads(config)[0].order == (0, 1, 4, 5, 2, 3, 6, 7)


def test_lists_give_the_heads_of_each_layer(configure):
    config = configure({"moh.shared_heads": [[7, 0], []], "moh.active_heads": [3, 5]})
    assert heads(config) == (LayerHeads(8, (0, 7), 3), LayerHeads(8, (), 5))
    assert heads(config)[0].order == (0, 7, 1, 2, 3, 4, 5, 6)
    assert active_share(config.model, config.moh) == 0.5


@pytest.mark.parametrize(("text", "count"), [("75%", 6), ("50 %", 4), ("62.5%", 5), ("100%", 8), ("100.0%", 8)])
def test_percentage_gives_a_number_of_heads(configure, text, count):
    assert [layer.active for layer in heads(configure({"moh.active_heads": text}))] == [count, count]


def test_lists_of_heads_are_read_back_from_yaml(configure, tmp_path):
    from moh_megatron.config.load import load_config

    config = configure({"moh.shared_heads": [[7, 0], []], "moh.active_heads": [3, 5]})
    (tmp_path / "a.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "a.yaml") == config
    assert load_config(tmp_path / "a.yaml", ["moh.active_heads=75%", "moh.shared_heads=[[1],[2,3]]"]).moh.active_heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moh.active_heads": "51%"}, "moh.active_heads must be a whole number of heads. Got 51% of 8, which is 4.08; "
                                      "nearest: 4 or 5."),
        ({"moh.active_heads": [4]}, "moh.active_heads must have an entry for each layer (2). Got 1."),
        ({"moh.active_heads": [4, 2]}, "moh.active_heads[1] must be greater than moh.shared_heads (2) and at most "
                                       "model.num_attention_heads (8). Got 2."),
        ({"moh.shared_heads": [[0, 0], [1]]}, "moh.shared_heads[0] must be distinct heads below "
                                              "model.num_attention_heads (8). Got [0, 0]."),
        ({"moh.shared_heads": [[0], [8]]}, "moh.shared_heads[1] must be distinct heads below "
                                           "model.num_attention_heads (8). Got [8]."),
        ({"moh.shared_placement": "spread", "moh.shared_heads": 3, "model.num_query_groups": 2},
         "moh.shared_heads must be a multiple of the KV groups (2) with moh.shared_placement: spread. Got 3; nearest: "
         "2 or 4."),
        ({"moh.shared_placement": "spread", "moh.shared_heads": [[0], [1]]},
         "moh.shared_placement: spread needs moh.shared_heads to be a number. Got a list for each layer, which says "
         "itself where the shared heads are; leave moh.shared_placement out."),
        ({"moh.straight_through": "all"}, "moh.straight_through: all needs moh.router: query_norm; the gates of the "
                                          "learned router are no straight-through ones. Got learned."),
        ({"moh.straight_through": "all", "moh.router": "query_norm", "moh.backend": "cpu"},
         "moh.backend must be dense or auto with moh.straight_through: all, which computes every head. Got cpu."),
        ({"moh.router": "query_norm", "moh.z_loss_coefficient": 0.1},
         "moh.z_loss_coefficient needs moh.router: learned; the query_norm router has no logits and no weights of its "
         "own. Got query_norm."),
        ({"moh.router": "query_norm", "moh.freeze_router": True},
         "moh.freeze_router needs moh.router: learned; the query_norm router has no logits and no weights of its own. "
         "Got query_norm."),
        ({"moh.freeze_router": True, "moh.balancing": "bias"},
         "moh.balancing must be loss with moh.freeze_router: biases would go on changing the routing. Got bias."),
        ({"moh.activation_schedule_steps": 101},
         "moh.activation_schedule_steps must be at most the run's 100 steps. Got 101."),
    ],
)  # fmt: skip
def test_impossible_heads_are_reported(configure, changes, message):
    with pytest.raises(UserError) as caught:
        configure(changes)
    assert str(caught.value).removeprefix("test: ") == message


@pytest.mark.parametrize("value", [0, -1, True, "75", "0x%", "101%", [4, 0], [], [4, "5"], {"a": 1}, 4.5])
def test_wrong_type_of_head_counts_is_reported(value):
    minimal = {
        "run": {"dir": "x"},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8, "vocab_size": 8},
        "moh": {"shared_heads": 0, "active_heads": value},
        "train": {"sequence_length": 4, "total_tokens": 8, "global_batch_size": 1},
        "optimizer": {"learning_rate": 1.0},
    }
    with pytest.raises(UserError, match=r"moh.active_heads: must be a number of heads above 0, a list of them, one a "):
        config_from_mapping(minimal, "test")
    minimal["moh"] = {"shared_heads": "two", "active_heads": 4}
    with pytest.raises(UserError, match=r"moh.shared_heads: must be a number of heads, or for each layer a list of "):
        config_from_mapping(minimal, "test")


@given(st.integers(1, 64), st.data())
def test_schedule_decreases_evenly_from_all_heads_to_the_target(count, data):
    shared = data.draw(st.integers(0, count - 1))
    active = data.draw(st.integers(shared + 1, count))
    steps = data.draw(st.integers(0, 50))
    layer = LayerHeads(count, tuple(range(shared)), active)
    course = [layer.top_k_at(step, steps) for step in range(steps + 3)]
    assert course == sorted(course, reverse=True)
    assert course[steps:] == [layer.top_k] * 3
    if steps:
        assert course[0] == len(layer.routed)
        # The numbers are as even as integers allow.
        ideal = [len(layer.routed) - (len(layer.routed) - layer.top_k) * step / steps for step in range(steps)]
        assert all(abs(got - want) < 1 for got, want in zip(course, ideal, strict=False))


GROUPED = {
    "model.num_query_groups": 2,
    "moh.routing_groups": "kv",
    "moh.shared_placement": "spread",
    "moh.shared_heads": 2,
    "moh.active_heads": 6,
}


def test_routing_groups_are_the_kv_groups(configure):
    assert heads(configure(GROUPED)) == (LayerHeads(8, (0, 4), 6, groups=2),) * 2
    lists = {**GROUPED, "moh.shared_placement": "first", "moh.shared_heads": [[1, 6], []], "moh.active_heads": [4, 2]}
    assert heads(configure(lists)) == (LayerHeads(8, (1, 6), 4, groups=2), LayerHeads(8, (), 2, groups=2))
    assert heads(configure({**GROUPED, "moh.active_heads": "50%", "moh.backend": "slots"}))[0].active == 4
    # One KV group: the choice among all its heads is the choice among all heads, and slots can compute it.
    one_group = {"model.num_query_groups": 1, "moh.backend": "slots"}
    assert heads(configure(one_group))[0].groups == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_query_groups": None},
         "moh.routing_groups: kv needs several query heads in each KV group: model.num_query_groups must be a divisor "
         "of model.num_attention_heads (8) below it; nearest: 4. Got 8 groups of one head; or leave "
         "moh.routing_groups at 1."),
        ({"model.num_query_groups": None, "model.num_attention_heads": 1, "moh.shared_heads": 0, "moh.active_heads": 1},
         "moh.routing_groups: kv needs several query heads in each KV group: model.num_query_groups must be a divisor "
         "of model.num_attention_heads (1) below it. Got 1 groups of one head; or leave moh.routing_groups at 1."),
        ({"model.num_query_groups": 3},
         "model.num_query_groups must divide model.num_attention_heads (8). Got 3; nearest: 2 or 4."),
        ({"moh.shared_heads": 3},
         "moh.shared_heads must be a multiple of the KV groups (2) from 0 to 6 with moh.routing_groups: kv. Got 3; "
         "nearest: 2 or 4."),
        ({"moh.active_heads": 5},
         "moh.active_heads must be a multiple of the KV groups (2) from 4 to 8 with moh.routing_groups: kv. Got 5; "
         "nearest: 4 or 6."),
        ({"moh.active_heads": 3},
         "moh.active_heads must be a multiple of the KV groups (2) from 4 to 8 with moh.routing_groups: kv. Got 3; "
         "nearest: 4."),
        ({"moh.active_heads": [6, 7]},
         "moh.active_heads[1] must be a multiple of the KV groups (2) from 4 to 8 with moh.routing_groups: kv. Got 7; "
         "nearest: 6 or 8."),
        ({"moh.shared_heads": 8, "moh.active_heads": 8},
         "moh.shared_heads must be a multiple of the KV groups (2) from 0 to 6 with moh.routing_groups: kv. Got 8; "
         "nearest: 6."),
        ({"moh.shared_placement": "first"},
         "moh.shared_placement must be spread or calibrated with moh.routing_groups: kv, which shares equally many "
         "heads in each KV group. Got first."),
        ({"moh.shared_placement": "first", "moh.shared_heads": [[0, 4], [0, 1]]},
         "moh.shared_heads[1] must have equally many heads in each of the 2 KV groups of 4 heads with "
         "moh.routing_groups: kv. Got 2, 0 of them in [0, 1]."),
        ({"moh.routing_groups": 1, "moh.backend": "slots"},
         "moh.backend: slots needs equally many active heads in every KV group, by moh.routing_groups: kv. Got 1 with "
         "2 KV groups."),
        ({"moh.routing_groups": 1, "moh.gate_softmax": "group"},
         "moh.gate_softmax: group needs moh.routing_groups: kv and moh.router: learned. Got 1 and learned."),
        ({"moh.router": "query_norm", "moh.gate_softmax": "group"},
         "moh.gate_softmax: group needs moh.routing_groups: kv and moh.router: learned. Got kv and query_norm."),
    ],
)  # fmt: skip
def test_heads_that_do_not_divide_over_the_groups_are_reported(configure, changes, message):
    with pytest.raises(UserError) as caught:
        configure({**GROUPED, **changes})
    assert str(caught.value).removeprefix("test: ") == message


@given(st.integers(1, 4), st.integers(2, 8), st.data())
def test_schedule_takes_one_head_of_each_group_at_a_time(groups, width, data):
    shared = data.draw(st.integers(0, width - 1))
    active = data.draw(st.integers(shared + 1, width))
    steps = data.draw(st.integers(1, 50))
    places = tuple(group * width + slot for group in range(groups) for slot in range(shared))
    layer = LayerHeads(groups * width, places, groups * active, groups)
    one_group = LayerHeads(width, tuple(range(shared)), active)
    for step in range(steps + 3):
        assert layer.top_k_at(step, steps) == groups * one_group.top_k_at(step, steps)
