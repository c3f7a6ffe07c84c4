"""A MoH model beside the dense one it came from."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F

from moh_megatron.io.errors import UserError
from moh_megatron.model.build import build_model
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.calibrate import Calibration
from moh_megatron.upcycle.loss_and_kl import dense_twin, mean, measure, recovered, upcycled
from moh_megatron.upcycle.untuned_report import (
    active_heads,
    as_markdown,
    compare_choices,
    planned,
    possible,
    shared_heads,
    with_choice,
)


@pytest.fixture
def documents():
    return [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 12, 9)]


@pytest.fixture
def dense(tiny, one_rank):
    config = dense_twin(tiny({"model.init_method_std": 0.2}))
    torch.manual_seed(0)
    return build_single_process(
        config, {name: each.detach() for name, each in model_tensors(build_model(config)).items()}
    )


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_with_all_heads_active_it_is_the_dense_model(tiny, dense, documents, router, balancing):
    config = tiny({"moh.router": router, "moh.balancing": balancing})
    model = upcycled(config, dense)
    _, found = measure(dense, {"all": (model, 8), "half": (model, 4)}, documents)
    assert max(found["all"].divergences) < 1e-8
    assert min(found["half"].divergences) > 1e-3


def test_a_dense_configuration_has_no_heads_to_choose(tiny):
    with pytest.raises(UserError, match=r"moh\.enabled must be true: .* Got false"):
        planned(tiny({"moh.enabled": False}), ["first"])
    assert possible(tiny({"moh.shared_heads": 0})) == ["first"]


def test_losses_and_divergences_are_by_document(tiny, dense, documents):
    model = upcycled(tiny({"moh.router": "query_norm"}), dense)
    losses, found = measure(dense, {"half": (model, 4)}, documents)
    wanted, here = (logits(each, documents[1][None, :-1])[0] for each in (dense, model))
    assert losses[1] == pytest.approx(float(F.cross_entropy(wanted, documents[1][1:])), rel=1e-5)
    assert found["half"].losses[1] == pytest.approx(float(F.cross_entropy(here, documents[1][1:])), rel=1e-5)
    by_hand = (wanted.softmax(-1) * (wanted.log_softmax(-1) - here.log_softmax(-1))).sum(-1).mean()
    assert found["half"].divergences[1] == pytest.approx(float(by_hand), rel=1e-4)


def test_the_weights_are_the_dense_models_own(tiny, dense):
    held = model_tensors(dense)
    ours = model_tensors(upcycled(tiny(), dense))
    assert all(ours[name].data_ptr() == tensor.data_ptr() for name, tensor in held.items())


def test_standard_errors():
    values = [1.0, 2.0, 4.0]
    assert mean(values).value == pytest.approx(7 / 3)
    assert mean(values).error == pytest.approx(statistics.stdev(values) / 3**0.5)
    start, dense_end = [5.0, 6.0, 7.0], [3.0, 3.5, 3.0]
    assert recovered(start, dense_end, dense_end).value == 1.0
    assert recovered(start, dense_end, dense_end).error == pytest.approx(0, abs=1e-12)
    assert recovered(start, start, dense_end).value == 0.0
    # Halfway on every document: no document says otherwise.
    half = [(one + other) / 2 for one, other in zip(start, dense_end, strict=True)]
    assert recovered(start, half, dense_end).value == pytest.approx(0.5)
    assert recovered(start, half, dense_end).error == pytest.approx(0, abs=1e-12)


def test_shares_become_heads(tiny):
    nine = tiny({"model.num_attention_heads": 9, "model.num_query_groups": 3, "model.hidden_size": 36})
    assert [active_heads(nine, share) for share in (100, 90, 75, 50)] == [9, 8, 7, 5]
    llama = tiny({"model.num_attention_heads": 32, "model.num_query_groups": 8, "model.hidden_size": 64,
                  "moh.shared_heads": 16, "moh.active_heads": 24})  # fmt: skip
    for choice in ("first", "spread", "calibrated"):
        assert [(active_heads(llama, share), shared_heads(llama, share, choice)) for share in (100, 90, 75, 50)] == [
            (32, 16), (29, 16), (24, 16), (16, 8)
        ]  # fmt: skip


def test_a_row_for_each_choice_and_share(tiny, dense, documents):
    config = tiny({"moh.shared_heads": 4, "moh.active_heads": 6, "moh.router": "query_norm"})
    calibration = Calibration(1, 1.0, (tuple(map(float, range(8))),) * 2)
    plan = planned(config, ["first", "spread", "calibrated"], (100, 75))
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


def test_a_choice_that_cannot_be_made_is_refused(tiny):
    with pytest.raises(UserError, match=r"at 75 %: moh\.shared_heads must be a multiple of the KV groups"):
        with_choice(tiny({"moh.shared_heads": 3, "moh.active_heads": 6}), "spread", 75)
    with pytest.raises(UserError, match=r"--choices list needs moh\.shared_heads to list heads for each layer"):
        with_choice(tiny({"moh.shared_placement": "calibrated"}), "list", 75)


@pytest.mark.parametrize(
    ("heads", "groups", "shared"), [(8, 4, 4), (32, 32, 16)], ids=["as many groups as active heads", "LLaMA 2"]
)
def test_where_no_multiple_of_the_groups_is_left_only_spread_is_left_out(tiny, heads, groups, shared):
    model = {"model.num_attention_heads": heads, "model.num_query_groups": groups, "model.hidden_size": 4 * heads}
    config = tiny({**model, "moh.shared_heads": shared, "moh.active_heads": shared + heads // 4})
    assert possible(config) == (["first", "calibrated"] if shared % groups else ["first", "spread", "calibrated"])
    plan = planned(config, possible(config))
    at_half = {name.split()[0]: each.moh for name, each in plan.items() if name.endswith(" 50")}
    assert {choice: (moh.shared_heads, moh.active_heads) for choice, moh in at_half.items()} == {
        "first": (heads // 2 - 1, heads // 2),
        "calibrated": (heads // 2 - 1, heads // 2),
    }
    listed = tiny({**model, "moh.shared_heads": [list(range(shared))] * 2, "moh.active_heads": shared + 1})
    assert [name.split()[1] for name in planned(listed, ["list"])] == ["100", "90", "75"]


def test_a_list_is_kept_at_every_share(tiny):
    listed = ((0, 5), (3, 7))
    config = tiny({"moh.shared_heads": [list(each) for each in listed], "moh.router": "query_norm"})
    for share, active in ((100, 8), (50, 4)):
        made = with_choice(config, "list", share)
        assert made is not None
        assert (made.moh.shared_heads, made.moh.active_heads, made.moh.shared_placement) == (listed, active, "first")
