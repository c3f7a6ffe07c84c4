"""Continues prompts with a trained model, an exported folder or a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moh_megatron.checkpoint.hf.transformers_io import open_tokenizer
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel, load_model
from moh_megatron.model.generation import generate_tokens

logger = logging.getLogger(__name__)


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
