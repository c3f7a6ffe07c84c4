"""Finds and loads the frozen dense model of distillation on this rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from moh_megatron.checkpoint import layout, weights
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import validate
from moh_megatron.io.errors import UserError, refuse_differences
from moh_megatron.io.json_file import read_json, write_json
from moh_megatron.model.build import build_model
from moh_megatron.parallel import groups


def find_teacher(config: Config) -> Path | None:
    """The checkpoint of distillation.teacher.

    Raises:
        UserError: it is not a dense model, has another vocabulary, or cannot be sharded as ``config`` says.
    """
    if config.distillation.teacher is None:
        return None
    checkpoint = layout.resolve_checkpoint(config.distillation.teacher)
    saved = layout.read_config(checkpoint)
    if saved.moh.enabled:
        raise UserError(f"distillation.teacher must be a dense model. Got {checkpoint}, with moh.enabled: true.")
    if (found := saved.model.tokens) != (own := config.model.tokens):
        raise UserError(
            f"distillation.teacher must know {own} tokens, padding left aside, as the model that learns. "
            f"Got {found} in {checkpoint}."
        )
    validate(_teacher_config(config, saved))
    return checkpoint


def record_teacher(config: Config, teacher: Path | None, *, resumed: bool) -> None:
    """Write to teacher.json of the run folder which weights teach.

    Raises:
        UserError: the run is resumed and had another teacher: the run folder named has a newer checkpoint by now, or
            the checkpoint named was made anew.
    """
    if teacher is None:
        return
    current = {"weights": layout.read_state(teacher).weights_sha256[:12]}
    file = Path(config.run.dir) / "teacher.json"
    if resumed and file.exists():
        saved = read_json(file, "the teacher of a run", "Delete it to go on with the one named.")
        remedy = "Name the checkpoint that taught it in distillation.teacher, or another run.dir."
        refuse_differences(f"{config.run.dir} learned from another teacher than {teacher}", saved, current, remedy)
    else:
        write_json(file, current)


def load_teacher(checkpoint: Path, config: Config, device: torch.device) -> nn.Module:
    """Load the model of ``checkpoint``, sharded as ``config`` shards the student, without gradients.

    The process groups must exist. The random states stay as they are.
    """
    written_by = layout.read_config(checkpoint)
    own = _teacher_config(config, written_by)
    with torch.random.fork_rng():
        model = build_model(own)
    weights.load_into(model, own, checkpoint, written_by, groups.tp_group().rank())
    return model.to(device).eval().requires_grad_(False)


def _teacher_config(config: Config, teacher: Config) -> Config:
    """The configuration of the teacher in a run of ``config``."""
    train = dataclasses.replace(config.train, recompute="none")
    padded = {"vocab_size": config.model.vocab_size, "vocab_padding": config.model.vocab_padding}
    model = dataclasses.replace(teacher.model, **padded)
    return dataclasses.replace(config, model=model, moh=teacher.moh, train=train)
