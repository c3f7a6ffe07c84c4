"""The frozen dense model of distillation, on this rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moh_megatron.checkpoint import native, weights
from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import validate
from moh_megatron.model.build import build_model
from moh_megatron.parallel import groups


def find_teacher(config: Config, report: Callable[[str], None]) -> Path | None:
    """The checkpoint of distillation.teacher, which ``report`` is told about as in ``resolve_checkpoint``.

    Raises:
        UserError: it is no dense model, or of another vocabulary, or cannot be cut as ``config`` says.
    """
    if config.distillation.teacher is None:
        return None
    checkpoint = native.resolve_checkpoint(config.distillation.teacher, report)
    there = native.read_config(checkpoint)
    if there.moh.enabled:
        raise UserError(f"distillation.teacher must be a dense model. Got {checkpoint}, with moh.enabled: true.")
    for key in ("vocab_size", "vocab_padding"):
        if (found := getattr(there.model, key)) != (own := getattr(config.model, key)):
            raise UserError(
                f"distillation.teacher must have model.{key} {own}, as the model that learns. "
                f"Got {found} in {checkpoint}."
            )
    validate(_cut_as(config, there))
    return checkpoint


def load_teacher(checkpoint: Path, config: Config, device: torch.device) -> nn.Module:
    """The model of ``checkpoint``, cut as ``config`` cuts the one that learns, without gradients.

    The process groups must exist. The random states stay as they are.
    """
    written_by = native.read_config(checkpoint)
    own = _cut_as(config, written_by)
    with torch.random.fork_rng():
        model = build_model(own)
    weights.load_into(model, own, checkpoint, written_by, groups.tensor_group().rank())
    return model.to(device).eval().requires_grad_(False)


def _cut_as(config: Config, teacher: Config) -> Config:
    """The configuration of the teacher in a run of ``config``."""
    train = dataclasses.replace(config.train, recompute="none")
    return dataclasses.replace(config, model=teacher.model, moh=teacher.moh, train=train)
