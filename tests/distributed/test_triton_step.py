"""A training step with the Triton kernels equals the dense one, with the heads of one rank and with all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layouts import TOLERANCE, Results, difference


@pytest.fixture(scope="module")
def results(spawn: Any) -> Results:
    return spawn("triton_step", 2)


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
def test_training_step_equals_dense(results: Results, layout: str) -> None:
    for rank in results:
        dense, sparse = rank["dense", layout], rank["triton", layout]
        assert torch.equal(dense["active"][0], sparse["active"][0])
        assert difference(sparse["loss"], dense["loss"]) < TOLERANCE
        for name, gradient in dense["gradients"].items():
            assert difference(sparse["gradients"][name], gradient) < TOLERANCE, name
