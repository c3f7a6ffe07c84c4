"""Which model continues a prompt, and that a checkpoint and its export continue it alike."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config, RunConfig
from moh_megatron.evaluate.generate import text_generator
from moh_megatron.evaluate.loaded_model import load_model
from moh_megatron.evaluate.model_folder import config_of_folder, model_to_load, training_config
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


def test_a_folder_with_a_model_stands_for_its_configuration(
    config: Config, checkpoint: Path, exported: Path, tmp_path: Path, fake_checkpoint: Any
) -> None:
    own = config_of_folder(checkpoint, ["generate.temperature=0", "run.seed=7"])
    assert (own.generate.load, own.generate.temperature, own.run.seed) == (str(checkpoint), 0.0, 7)
    assert own.model == config.model
    # An exported folder that lies outside its run has config.json alone.
    assert not (exported.parent / "config.yaml").exists()
    of_export = config_of_folder(exported, ["generate.prompts=[the quick]"])
    assert (of_export.generate.load, of_export.generate.prompts) == (str(exported), ("the quick",))
    assert of_export.model.num_attention_heads == config.model.num_attention_heads
    assert of_export.generate.temperature == config.generate.temperature
    # A run folder gives its export, else its newest checkpoint, wherever it was moved.
    run = tmp_path / "moved"
    newest = fake_checkpoint(run / "checkpoints" / "step_00000002", config, step=2)
    assert config_of_folder(run, []).generate.load == str(newest)
    shutil.copytree(exported, run / "hf")
    (run / "config.yaml").write_text(dump_config(dataclasses.replace(config, run=RunConfig(dir="elsewhere", seed=9))))
    of_run = config_of_folder(run, [])
    assert (of_run.generate.load, of_run.run.seed) == (str(run / "hf"), 9)
    assert config_of_folder(run / "hf", []).run.seed == 9
    assert model_to_load(of_run) == run / "hf"


def test_a_folder_without_a_model_or_with_two_is_refused(config: Config, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        config_of_folder(tmp_path / "empty", [])
    with pytest.raises(UserError, match=r"generate\.load must be left out where CONFIG is a folder with a model"):
        config_of_folder(exported, ["generate.load=other"])


def test_a_model_is_not_asked_to_choose_among_other_heads_than_in_its_training(
    config: Config, tmp_path: Path, fake_checkpoint: Any
) -> None:
    def choosing(groups: Any) -> Config:
        moh = dataclasses.replace(config.moh, routing_groups=groups, shared_heads=8, active_heads=16)
        return with_generate(dataclasses.replace(config, moh=dataclasses.replace(moh, shared_placement="spread")), run)

    run = tmp_path / "run"
    newest = fake_checkpoint(run / "checkpoints" / "step_00000002", choosing("kv"))
    assert model_to_load(choosing("kv")) == newest
    difference = (
        rf"^{newest} was made with other values:\n  moh\.routing_groups: expected kv, got 1\nA model computes with the "
        "routing of its training: leave these values as they are, or train another model"
    )
    for ask in (
        lambda: model_to_load(choosing(1)),
        lambda: config_of_folder(newest, ["moh.routing_groups=1"]),
        lambda: training_config(newest, ["moh.routing_groups=1"]),  # moh-evaluate
    ):
        with pytest.raises(UserError, match=difference):
            ask()
    # Another configuration may name the model for its prompts.
    load = dataclasses.replace(choosing(1).generate, load=str(newest))
    assert model_to_load(dataclasses.replace(choosing(1), generate=load)) == newest
    assert config_of_folder(newest, []).moh.routing_groups == "kv"
    # A single KV group is the whole layer.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_query_groups=1))
    one = fake_checkpoint(run / "checkpoints" / "step_00000003", choosing("kv"))
    assert model_to_load(choosing(1)) == one


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
