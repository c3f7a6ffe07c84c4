"""Index caches are built once, or once on each node if nodes share no file system."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("index_caches", 2)


def test_one_rank_builds_on_a_shared_file_system(results: list[dict[str, Any]]) -> None:
    assert [rank["built"] for rank in results] == [[0], []]
    assert [rank["rank_in_cache"] for rank in results] == ["0", "0"]
    assert results[0]["shared"] == results[1]["shared"]


def test_each_node_builds_its_own_caches_without_a_shared_file_system(results: list[dict[str, Any]]) -> None:
    assert results[0]["own"] == results[1]["own"] == results[0]["shared"]
    caches = results[1]["caches"]
    assert {cache.split("/")[0] for cache in caches} == {"node0", "node1"}
    assert len(caches) % 2 == 0


def test_all_ranks_raise_if_one_node_cannot_write(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert "Cannot build the index cache" in rank["fault"]
        assert "node1" in rank["fault"]
