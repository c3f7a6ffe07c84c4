"""The placement of heads: permutations, equal shares for every rank, reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.config.head_layout import HeadLayout

PLACEMENTS = ["interleaved", "contiguous"]
shapes = st.tuples(st.integers(1, 48), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[0]))


@given(shapes, st.sampled_from(PLACEMENTS))
def test_orders_are_permutations_of_complete_groups(shape, placement):
    heads, groups = shape
    layout = HeadLayout(heads, groups, placement)
    width = heads // groups
    assert sorted(layout.group_order) == list(range(groups))
    assert sorted(layout.head_order) == list(range(heads))
    assert [head // width for head in layout.head_order[::width]] == list(layout.group_order)
    for start in range(0, heads, width):
        first = layout.head_order[start]
        assert layout.head_order[start : start + width] == tuple(range(first, first + width))


@given(shapes, st.sampled_from(PLACEMENTS), st.data())
def test_local_heads_of_all_ranks_are_the_physical_order(shape, placement, data):
    heads, groups = shape
    size = data.draw(st.sampled_from([size for size in range(1, groups + 1) if groups % size == 0]))
    layout = HeadLayout(heads, groups, placement)
    shares = [layout.local_heads(rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {heads // size}
    assert tuple(head for share in shares for head in share) == layout.head_order


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16, 32, 64])
def test_interleaved_ranks_get_equal_shares_of_the_first_groups(groups):
    layout = HeadLayout(2 * groups, groups)
    size = 1
    while size <= groups:
        for shared_groups in range(groups + 1):
            shares = [sum(head < 2 * shared_groups for head in layout.local_heads(rank, size)) for rank in range(size)]
            assert max(shares) - min(shares) <= 2  # one group of two heads
            if shared_groups % size == 0:
                assert set(shares) == {2 * shared_groups // size}
        size *= 2


@pytest.mark.parametrize("groups", [3, 6, 9, 10, 12, 15, 18, 20, 24, 30, 36, 40, 48])
def test_interleaved_shares_are_even_for_every_divisor(groups):
    layout = HeadLayout(groups, groups)
    for size in (size for size in range(2, groups + 1) if groups % size == 0):
        for shared in range(groups + 1):
            shares = [sum(head < shared for head in layout.local_heads(rank, size)) for rank in range(size)]
            assert max(shares) - min(shares) <= 1, (size, shared)


def test_interleaved_orders_stay_as_checkpoints_have_them():
    assert HeadLayout(8, 8).group_order == (0, 4, 2, 6, 1, 5, 3, 7)
    assert HeadLayout(8, 4).head_order == (0, 1, 4, 5, 2, 3, 6, 7)
    assert HeadLayout(6, 6).group_order == (0, 3, 4, 1, 2, 5)
    assert HeadLayout(5, 5).group_order == (0, 1, 2, 3, 4)


def test_contiguous_placement_keeps_the_order():
    layout = HeadLayout(8, 4, "contiguous")
    assert layout.head_order == tuple(range(8))
    assert layout.local_heads(1, 2) == (4, 5, 6, 7)


def test_layout_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"^groups must divide heads \(8\)\. Got 3\.$"):
        HeadLayout(8, 3)
    with pytest.raises(ValueError, match=r"^world_size must divide groups \(4\)\. Got 8\.$"):
        HeadLayout(8, 4).local_heads(0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 0), r"^groups must divide heads \(8\)\. Got 0\.$"),
        ((8, -2), r"^groups must divide heads \(8\)\. Got -2\.$"),
        ((8, 4, "contigous"), r"^placement must be one of interleaved, contiguous\. Got 'contigous'\.$"),
    ],
)
def test_layout_refuses_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadLayout(*arguments)


@pytest.mark.parametrize(
    ("shared", "active", "message"),
    [
        ([0, 0], 4, "^shared_heads must be distinct heads below 8"),
        ([8], 4, "^shared_heads must be distinct heads below 8"),
        (4, 2, "^active_heads must be from the 4 shared heads, and 1, to 8. Got 2"),
        (0, 0, "^active_heads must be from the 0 shared heads, and 1, to 8. Got 0"),
        (0, 9, "^active_heads must be from the 0 shared heads, and 1, to 8. Got 9"),
    ],
)
def test_report_refuses_impossible_heads(shared, active, message):
    with pytest.raises(ValueError, match=message):
        HeadLayout(8, 4).report(shared, active)


def test_report_has_a_line_for_each_possible_size():
    lines = HeadLayout(9, 3).report(3, 5).splitlines()
    assert [line.split(":")[0] for line in lines] == ["TP 1", "TP 3"]


def test_report_gives_load_imbalance_and_remedy():
    layout = HeadLayout(8, 4)
    assert layout.expected_load(2, 4, 1) == pytest.approx([4.0])
    assert layout.expected_load(2, 4, 2) == pytest.approx([2 + 2 * 2 / 6, 4 * 2 / 6])
    assert sum(layout.expected_load(3, 6, 4)) == pytest.approx(6)
    assert HeadLayout(32, 8).expected_load(16, 24, 4) == pytest.approx([6.0] * 4)
    assert max(HeadLayout(32, 8, "contiguous").expected_load(16, 24, 2)) == 16
    assert HeadLayout(8, 8).expected_load(8, 8, 8) == [1.0] * 8
    lines = HeadLayout(32, 8).report(16, 24).splitlines()
    assert [line.split(":")[0] for line in lines] == ["TP 1", "TP 2", "TP 4", "TP 8"]
    assert lines[2].endswith("max / mean 1.00")
    assert all("uneven" not in line for line in lines[:3])
    assert "max / mean 1.33 - uneven; as many shared heads in each of the 8 KV groups would even it out: " in lines[3]
    assert "moh.shared_placement=spread, with moh.shared_heads a multiple of 8" in lines[3]
    spread = [4 * group + slot for group in range(8) for slot in range(2)]
    assert "uneven" not in HeadLayout(32, 8).report(spread, 24)
    # What no rank of this run computes is not reported.
    assert HeadLayout(32, 8).report(16, 24, in_use=1) == lines[0]
    assert HeadLayout(32, 8).report(16, 24, in_use=8) == lines[3]
    assert HeadLayout(32, 8, "contiguous").expected_load(spread, 24, 8) == pytest.approx([3.0] * 8)
    assert HeadLayout(32, 8).imbalance(16, 24, 8) == pytest.approx(4 / 3)
