"""What a run logs of its heads before the first step."""

from __future__ import annotations

import logging

import pytest

from moh_megatron.train import announce


@pytest.mark.parametrize("tensor", [1, 2])
def test_heads_chosen_in_kv_groups_are_announced_as_even(tiny, caplog, tensor):
    groups = {"model.num_query_groups": 2, "moh.routing_groups": "kv", "moh.shared_placement": "spread"}
    with caplog.at_level(logging.INFO):
        announce._announce_heads(tiny({**groups, "parallel.tensor": tensor}), warns=True)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    head, load, promise = caplog.messages[0].splitlines()
    assert head == "heads, interleaved, every layer: 4 of 8 active, 2 of them shared"
    assert load.startswith(f"  TP {tensor}: ")
    assert load.endswith("max / mean 1.00")
    assert promise == ("  even at every tensor-parallel size: equally many active heads in each of 2 KV groups")


def test_heads_chosen_anywhere_are_not_announced_as_even(tiny, caplog):
    with caplog.at_level(logging.INFO):
        announce._announce_heads(tiny(), warns=True)
    assert "even at every" not in caplog.text
