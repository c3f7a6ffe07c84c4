"""Fixtures of the exported model's tests."""

from __future__ import annotations

import pytest
import torch

from moh_megatron.checkpoint.hf.hf_model import modeling_moh


@pytest.fixture
def sparse_calls(monkeypatch) -> list[int]:
    """The prompt length of every call of ``attend_active``; the model sees one thread."""
    calls: list[int] = []
    attend_active = modeling_moh.attend_active

    def counted(*arguments):
        calls.append(arguments[0].shape[2])
        return attend_active(*arguments)

    monkeypatch.setattr(modeling_moh, "attend_active", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return calls
