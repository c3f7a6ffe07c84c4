"""Weights of another run are taken where its heads are the same, however they are said."""

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.train.resume import weights_to_start_from


@pytest.fixture
def starts(tiny, fake_checkpoint, tmp_path):
    """starts(saved, current): whether a run with some changes starts from the weights of one with others."""

    def starts(saved, current):
        folder = fake_checkpoint(tmp_path / "step_00000005", tiny(saved))
        return weights_to_start_from(tiny({**current, "train.init_from": str(folder)})) == folder

    return starts


@pytest.mark.parametrize(("groups", "listed"), [(1, [0, 1]), (2, [0, 4])])
def test_shared_heads_may_be_said_as_an_export_says_them(starts, grouped, groups, listed):
    spread = {**grouped, "model.num_query_groups": groups, "moh.shared_heads": 2}
    exported = {**spread, "moh.shared_placement": "first", "moh.shared_heads": [listed] * 2}
    assert starts(exported, spread)


def test_other_shared_heads_are_refused_and_both_named(starts, grouped):
    exported = {**grouped, "moh.shared_placement": "first", "moh.shared_heads": [[0, 5]] * 2}
    with pytest.raises(UserError) as caught:
        starts(exported, {**grouped, "moh.shared_heads": 2})
    assert str(caught.value).splitlines()[1:3] == [
        "  moh.shared_heads: expected ((0, 5), (0, 5)), got 2",
        "  moh.shared_placement: expected first, got spread",
    ]


def test_a_dense_checkpoint_differs_in_nothing_but_its_routers(starts, grouped):
    with pytest.raises(UserError) as caught:
        starts({"model.num_query_groups": 2, "moh.enabled": False}, grouped)
    assert str(caught.value).splitlines()[1:] == [
        "  moh.enabled: expected False, got True",
        "train.init_from needs weights of the same architecture.",
    ]
