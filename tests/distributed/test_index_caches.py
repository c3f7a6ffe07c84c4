"""The indices of a dataset are built once, or once a node where nodes share no file system."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("index_caches", 2)


def test_one_rank_builds_on_a_shared_file_system(results: list[dict[str, Any]]) -> None:
    assert [each["built"] for each in results] == [[0], []]
    assert results[0]["shared"] == results[1]["shared"]


def test_each_node_builds_its_own_otherwise(results: list[dict[str, Any]]) -> None:
    assert results[0]["own"] == results[1]["own"] == results[0]["shared"]
    caches = results[1]["caches"]
    assert {cache.split("/")[0] for cache in caches} == {"node0", "node1"}
    assert len(caches) % 2 == 0


def test_a_node_that_cannot_write_ends_all_ranks(results: list[dict[str, Any]]) -> None:
    for each in results:
        assert "Cannot build the index cache" in each["fault"]
        assert "node1" in each["fault"]
