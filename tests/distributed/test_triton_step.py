"""A whole training step with the Triton kernels equals the dense one."""

from __future__ import annotations

from typing import Any

import torch
from support.layouts import TOLERANCE, difference


def test_a_training_step_equals_dense(spawn: Any) -> None:
    (results,) = spawn("triton_step", 1)
    dense, sparse = results["learned", "dense"], results["learned", "triton"]
    assert torch.equal(dense["active"][0], sparse["active"][0])
    assert difference(sparse["loss"], dense["loss"]) < TOLERANCE
    for name, gradient in dense["gradients"].items():
        assert difference(sparse["gradients"][name], gradient) < TOLERANCE, name
