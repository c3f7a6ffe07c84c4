"""What the tests of the exported model share."""

from __future__ import annotations

import pytest
import torch

from moh_megatron.checkpoint.hf.hf_model import modeling_moh


@pytest.fixture
def sparse_calls(monkeypatch) -> list[int]:
    """Lengths of what is computed for active heads alone from here on, on one thread as far as the model can see."""
    calls: list[int] = []
    attend_active = modeling_moh.attend_active

    def counted(*given):
        calls.append(given[0].shape[2])
        return attend_active(*given)

    monkeypatch.setattr(modeling_moh, "attend_active", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return calls
