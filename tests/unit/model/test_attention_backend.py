"""The warning of slow attention and its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moh_megatron.config.schema import Config
from moh_megatron.model import attention_backend
from moh_megatron.model.attention_backend import flash_refusal
from moh_megatron.moh.backends import cpu

SHAPE = {"length": 256, "heads": 8, "groups": 4, "head_dim": 64}


def test_flash_kernel_is_refused_on_a_cpu() -> None:
    assert flash_refusal(**SHAPE, dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.mark.gpu
def test_flash_kernel_accepts_bf16_and_refuses_fp32() -> None:
    device = torch.device("cuda")
    assert flash_refusal(**SHAPE, dtype=torch.bfloat16, device=device) is None
    assert "dtype" in str(flash_refusal(**SHAPE, dtype=torch.float32, device=device))


@pytest.mark.parametrize(
    ("threads", "device", "changes", "named"),
    [
        (1, "cuda", {}, "slots"),
        (2, "cpu", {}, "slots"),
        (1, "cpu", {}, "cpu, slots where documents are short"),
        (1, "cpu", {"moh.active_heads": 8}, "dense"),
        (2, "cpu", {"moh.active_heads": [8, 4]}, "dense or slots, by the heads of a layer and rank"),
        (2, "cpu", {"moh.backend": "dense"}, "dense"),
        (2, "cpu", {"moh.router": "query_norm", "moh.straight_through": "all"}, "dense"),
    ],
)
def test_reported_backend_of_heads_chosen_in_kv_groups(
    tiny: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    device: str,
    changes: dict[str, Any],
    named: str,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu, "available", lambda *shape: True)
    groups = {"model.num_query_groups": 2, "moh.routing_groups": "kv", "moh.shared_placement": "spread"}
    documents = {"data.document_mask": True, "train.sequence_length": 512}
    config = tiny({**groups, **documents, **changes})
    assert attention_backend.attention_backend(config, torch.device(device)) == named


def test_warning_of_slow_attention_depends_on_the_shape_of_a_rank(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    monkeypatch.setattr(attention_backend, "flash_refusal", lambda **shape: shapes.append(shape) or "too old")
    config, cuda = tiny({"parallel.tensor": 2, "moh.backend": "dense"}), torch.device("cuda")
    warning = attention_backend.attention_warning(config, cuda)
    assert warning is not None
    assert warning.endswith(": too old")
    expected = {"length": 16, "heads": 4, "groups": 2, "head_dim": 4, "dtype": torch.float32, "device": cuda}
    assert shapes == [expected]
    assert attention_backend.attention_warning(config, torch.device("cpu")) is None
    assert attention_backend.attention_warning(tiny({"moh.backend": "triton"}), cuda) is None
    in_groups = {"model.num_query_groups": 2, "moh.routing_groups": "kv", "moh.shared_placement": "spread"}
    for active in (4, [8, 4]):
        assert attention_backend.attention_warning(tiny(in_groups | {"moh.active_heads": active}), cuda) == warning
    monkeypatch.setattr(attention_backend, "flash_refusal", lambda **shape: None)
    assert attention_backend.attention_warning(config, cuda) is None
