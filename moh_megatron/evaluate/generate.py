"""Continues prompts with a trained model, an exported folder or a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moh_megatron.checkpoint.hf.transformers_io import open_tokenizer
from moh_megatron.checkpoint.layout import CONFIG
from moh_megatron.config.paths import EXPORT
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.early_checks import check_model_folder
from moh_megatron.evaluate.loaded_model import (
    LoadedModel,
    find_model,
    is_exported,
    load_model,
    require_same_choice,
    training_config,
)
from moh_megatron.io.errors import UserError
from moh_megatron.model.generation import generate_tokens

logger = logging.getLogger(__name__)


def model_to_load(config: Config) -> Path:
    """generate.load, else the run's exported folder, else the run's newest checkpoint.

    Raises UserError where there is none, and where ``config`` no longer describes the run's model.
    """
    check_model_folder(config)
    if config.generate.load is not None:
        return find_model(Path(config.generate.load))
    model = _model_of_run(Path(config.run.dir))
    require_same_choice(model, config)
    return model


def _model_of_run(run_dir: Path) -> Path:
    """The exported folder of a run, else its newest checkpoint. Raises UserError."""
    exported = run_dir / EXPORT
    return exported if is_exported(exported) else find_model(run_dir)


def config_of_folder(folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration of the model in ``folder``, a run folder, a checkpoint or an exported one, with generate.load.

    It is that of the model's training, or follows from config.json where an exported folder lies outside its run.
    Raises UserError.
    """
    if any(override.startswith("generate.load=") for override in overrides):
        raise UserError(f"generate.load must be left out where CONFIG is a folder with a model. Got both: {folder}.")
    model = folder if is_exported(folder) else _model_of_run(folder)
    if not is_exported(model) or (model.parent / CONFIG).is_file():
        config = training_config(model, list(overrides))
    else:
        config = _config_from_json(model, overrides)
    return replace(config, generate=replace(config.generate, load=str(model)))


def _config_from_json(folder: Path, overrides: Sequence[str]) -> Config:
    # Imported here because a checkpoint needs none of it.
    from moh_megatron.checkpoint.hf.hf_import import import_config

    try:
        return import_config(folder, folder, None, overrides, ())
    except UserError as error:
        other = f"Of another model name a configuration, too: moh-generate CONFIG generate.load={folder}"
        raise UserError(f"{error}\n{other}") from None


def text_generator(path: Path, config: Config, trust_remote_code: bool = False) -> Callable[[str], str]:
    """A function from a prompt to the prompt and its continuation by the model in ``path``.

    It samples as the section generate of ``config`` says, from the same seed for every prompt. An exported folder
    computes in the precision of its weights, a checkpoint in fp32. Code in a folder runs only with
    ``trust_remote_code``.
    """
    logger.info(f"model: {path}")
    loaded = load_model(path, torch.device("cpu"), None, trust_remote_code)
    return _exported_generator(loaded, config) if loaded.config is None else _checkpoint_generator(loaded, config)


def _exported_generator(loaded: LoadedModel, config: Config) -> Callable[[str], str]:
    model: Any = loaded.model
    tokenizer: Any = open_tokenizer(loaded.tokenizer_dir, loaded.trust_remote_code)
    settings = config.generate
    sampling: dict[str, Any] = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_k": settings.top_k or 0}

    def complete(prompt: str) -> str:
        torch.manual_seed(config.run.seed)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        tokens = torch.tensor([ids])
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=settings.max_new_tokens, **sampling
        )
        return prompt + tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)

    return complete


def _checkpoint_generator(loaded: LoadedModel, config: Config) -> Callable[[str], str]:
    assert loaded.config is not None, "a checkpoint has the configuration of its training"
    context = loaded.config.train.sequence_length
    tokenizer = load_tokenizer(loaded.tokenizer_dir)
    settings = config.generate

    def complete(prompt: str) -> str:
        tokens = generate_tokens(
            loaded.model,
            tokenizer.encode(prompt) or [tokenizer.eos_token_id],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            stop_token=tokenizer.eos_token_id,
            context=context,
            seed=config.run.seed,
            device=loaded.device,
        )
        return prompt + tokenizer.decode(tokens)

    return complete
