"""Fixtures of the tests of upcycling."""

from __future__ import annotations

import pytest
import torch

from moh_megatron.model.build import build_model
from moh_megatron.model.single import build_single_process
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.loss_and_kl import without_moh


@pytest.fixture
def documents():
    """Random documents of three lengths."""
    return [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 12, 9)]


@pytest.fixture
def dense(tiny, one_rank):
    """A dense model with random weights in this process."""
    config = without_moh(tiny({"model.init_method_std": 0.2}))
    torch.manual_seed(0)
    return build_single_process(
        config, {name: tensor.detach() for name, tensor in model_tensors(build_model(config)).items()}
    )
