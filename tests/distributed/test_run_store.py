"""Every key in the store of a run carries the job's token, torch.distributed's own keys too."""

from __future__ import annotations

from typing import Any

import pytest

TOKEN = "0123456789abcdef"
"""That of workers/run_store.py."""


@pytest.fixture(scope="module")
def results(spawn: Any) -> list[dict[str, Any]]:
    return spawn("run_store", 2)


@pytest.mark.parametrize("host", ["launcher", "rank 0"])
def test_every_key_begins_with_the_token(results: list[dict[str, Any]], host: str) -> None:
    for rank in results:
        keys, total = rank[host]
        # Doubled by each group of both ranks: all, control and tensor-parallel. A data-parallel group is one rank.
        assert total == 8
        assert [key for key in keys if not key.startswith(f"{TOKEN}_")] == []
        parts = {key.split("/")[0] for key in keys}
        assert parts == {f"{TOKEN}_torch", f"{TOKEN}_heartbeat_0"}
