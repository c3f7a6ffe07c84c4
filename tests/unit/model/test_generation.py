"""Generation of tokens: context, sampling, determinism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, position_ids
from moh_megatron.model.generation import generate_tokens, sample_token

pytestmark = pytest.mark.usefixtures("one_rank")


def test_generation_uses_the_last_tokens_of_the_context(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny()).eval()
    prompt = list(range(1, 30))
    settings: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0, "top_k": None, "stop_token": 95, "seed": 0}
    settings["device"] = torch.device("cpu")
    with torch.no_grad():
        window = torch.tensor([prompt[-8:]])
        expected = int(model(window, position_ids(window), None)[0, -1].argmax())
    assert generate_tokens(model, prompt, context=8, **settings) == [expected]


def test_sample_token_follows_temperature_and_top_k() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 5.0, 1.0, 4.0])
    assert sample_token(logits, 0, None, generator) == 1
    drawn = {sample_token(logits, 2.0, 2, generator) for _ in range(200)}
    assert drawn == {1, 3}
    assert {sample_token(logits, 50.0, None, generator) for _ in range(200)} == {0, 1, 2, 3}


def test_generation_is_deterministic_and_respects_its_limit(tiny: Callable[..., Config]) -> None:
    model = build_model(tiny()).eval()

    def write(context: int) -> list[int]:
        return generate_tokens(
            model,
            [1, 2, 3],
            max_new_tokens=20,
            temperature=1.0,
            top_k=None,
            stop_token=95,
            context=context,
            seed=4,
            device=torch.device("cpu"),
        )

    assert write(16) == write(16)
    assert len(write(4)) <= 20
