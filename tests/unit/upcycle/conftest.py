"""Fixtures of the tests of upcycling."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.upcycling import FakeData
from torch import nn

from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model
from moh_megatron.model.single import build_single_process
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle import initial_checkpoint
from moh_megatron.upcycle.loss_and_kl import without_moh


@pytest.fixture
def documents():
    """Random documents of three lengths."""
    return [torch.randint(96, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 12, 9)]


@pytest.fixture
def dense(tiny, one_rank):
    """A dense model with random weights in this process."""
    return _dense_model(tiny({"model.init_method_std": 0.2}))


@pytest.fixture
def grouped_dense(tiny, grouped, one_rank):
    """A dense model of two KV groups with random weights in this process."""
    return _dense_model(tiny({**grouped, "model.init_method_std": 0.2}))


def _dense_model(moh: Config) -> nn.Module:
    config = without_moh(moh)
    torch.manual_seed(0)
    return build_single_process(
        config, {name: tensor.detach() for name, tensor in model_tensors(build_model(config)).items()}
    )


@pytest.fixture
def data(monkeypatch) -> SimpleNamespace:
    """Replaces the reading of prepared data; returns settings of it."""
    rows = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(initial_checkpoint, "load_prepared", lambda config: FakeData())
    monkeypatch.setattr(initial_checkpoint, "build_train_dataset", lambda config, data, tokenizer: rows)
    monkeypatch.setattr(FakeData, "settings", SimpleNamespace(fits=True))
    return FakeData.settings


@pytest.fixture
def make(tiny, tmp_path) -> Callable[..., Config]:
    """make({...}): the configuration of a tuning that starts from the checkpoint tmp_path/source."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        paths = {"run.dir": str(tmp_path / "run"), "train.init_from": str(tmp_path / "source")}
        return tiny({**paths, "moh.router": "query_norm", "model.init_method_std": 0.2, **(changes or {})})

    return make


@pytest.fixture
def logged(caplog) -> pytest.LogCaptureFixture:
    """caplog, from INFO on."""
    caplog.set_level(logging.INFO)
    return caplog
