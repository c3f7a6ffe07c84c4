"""Which model continues a prompt, and that a checkpoint and its export continue it alike."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moh_megatron.config.schema import Config
from moh_megatron.evaluate.generate import model_to_load, text_generator
from moh_megatron.evaluate.loaded_model import load_model
from moh_megatron.io.errors import UserError


def with_generate(config: Config, run: Path, **settings: Any) -> Config:
    generate = dataclasses.replace(config.generate, max_new_tokens=8, **settings)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(run)), generate=generate)


def test_generate_load_comes_before_the_export_of_the_run_and_that_before_its_checkpoints(
    config: Config, tmp_path: Path, fake_checkpoint: Any
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"run: no such run folder\. Train first"):
        model_to_load(with_generate(config, run))
    newest = fake_checkpoint(run / "checkpoints" / "step_00000002", config, step=2)
    assert model_to_load(with_generate(config, run)) == newest
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text("{}")
    assert model_to_load(with_generate(config, run)) == run / "hf"
    assert model_to_load(with_generate(config, run, load=str(run / "checkpoints"))) == newest


@pytest.mark.parametrize("prompt", ["the quick", ""])
def test_a_checkpoint_and_its_export_generate_the_same_text(
    config: Config, checkpoint: Path, exported: Path, tmp_path: Path, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    greedy = with_generate(config, tmp_path, temperature=0.0)
    caplog.set_level(logging.INFO)
    text = text_generator(checkpoint, greedy)(prompt)
    assert caplog.messages == [f"model: {checkpoint}"]
    assert text.startswith(prompt)
    assert len(text) > len(prompt)
    assert text_generator(exported, greedy)(prompt).strip() == text.strip()


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_sampled_text_depends_on_the_seed_alone(
    config: Config, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sampled = with_generate(config, tmp_path, temperature=1.0, top_k=None)
    complete = text_generator(request.getfixturevalue(kind), sampled)
    other_seed = dataclasses.replace(sampled, run=dataclasses.replace(sampled.run, seed=99))
    assert complete("the") == complete("the")
    assert text_generator(request.getfixturevalue(kind), other_seed)("the") != complete("the")


def test_an_export_is_loaded_in_the_precision_of_its_weights(export: Callable[[torch.dtype], Path]) -> None:
    folder = export(torch.bfloat16)
    loaded: Any = load_model(folder, torch.device("cpu"), dtype=None)
    assert loaded.model.dtype == torch.bfloat16
    loaded = load_model(folder, torch.device("cpu"))
    assert loaded.model.dtype == torch.float32
