"""Writes a model as a Hugging Face folder that opens without this package."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from moh_megatron.checkpoint.hf.hf_config import CODE, hf_config
from moh_megatron.checkpoint.hf.hf_extras import GENERATION, SpecialTokenIds, read_extras, special_token_ids
from moh_megatron.checkpoint.hf.hf_folder import CONFIG, MARKER, MARKER_CONTENT, Form, check_replaceable, check_routers
from moh_megatron.checkpoint.hf.hf_model import configuration_moh
from moh_megatron.checkpoint.hf.hf_tokenizer import check_generation, write_tokenizer
from moh_megatron.checkpoint.hf.hf_writer import write_weights
from moh_megatron.checkpoint.hf.model_card import model_card
from moh_megatron.checkpoint.hf.skywork import skywork_config
from moh_megatron.checkpoint.hf.weight_readers import WeightSource
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.names import TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import has_tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json_if_any

MAX_SHARD_SIZE = "5GB"


@contextmanager
def atomic_export(hf_dir: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces ``hf_dir`` when the block succeeds, and is deleted when the block fails.

    Raises:
        UserError: ``hf_dir`` holds something other than an earlier export.
        Fault: the disk is full, or writing fails.
    """
    check_replaceable(hf_dir)
    with atomic_folder(hf_dir) as folder:
        yield folder


def _config_json(
    config: Config, dtype: torch.dtype, token_ids: SpecialTokenIds, form: Form
) -> PretrainedConfig | dict[str, Any]:
    check_routers(config, form)
    build = skywork_config if form == "official" else hf_config
    return build(config, dtype, token_ids)


def check_form(config: Config, form: Form) -> None:
    """Raise UserError if ``form`` cannot express the model."""
    _config_json(config, torch.float32, SpecialTokenIds(), form)


def write_folder(
    folder: Path,
    config: Config,
    source: WeightSource,
    tokenizer_dir: Path,
    dtype: torch.dtype | None,
    *,
    step: int,
    tokens: int,
    form: Form = "moh",
) -> None:
    """Fill an empty ``folder``, such as one of ``atomic_export``, for AutoModelForCausalLM and AutoTokenizer.

    Args:
        tokenizer_dir: holds the tokenizer's files, if there is a tokenizer, and ``HFExtras``, whose token ids have
            precedence over the tokenizer's.
        dtype: precision of the written weights; None keeps the precision of each tensor.
        step, tokens: training so far, for the model card.
        form: moh, which includes the code of a MoH model; llama, for a dense model; official, LLaMA's names and
            settings alone, as SkyworkAI's modelling file reads them.

    Raises:
        UserError: weights, tokenizer and configuration do not fit together, or the form cannot express the model.
    """
    tokenizer = load_tokenizer(tokenizer_dir) if has_tokenizer(tokenizer_dir) else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.tokens:
        raise UserError(
            f"{tokenizer_dir}: the tokenizer must have at most model.vocab_size ({config.model.tokens}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    extras = read_extras(tokenizer_dir)
    check_generation(tokenizer_dir, config.model.tokens)
    stated_ids = special_token_ids(extras)
    token_ids = stated_ids or (SpecialTokenIds() if tokenizer is None else SpecialTokenIds.from_tokenizer(tokenizer))
    precision = dtype or source.dtype(rules(config)[0])
    config_json = _config_json(config, precision, token_ids, form)
    if isinstance(config_json, dict):
        (folder / CONFIG).write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
    else:
        config_json.save_pretrained(folder)
    if GENERATION in extras:
        (folder / GENERATION).write_bytes(extras[GENERATION])
    else:
        pad = token_ids.pad if tokenizer is None or stated_ids else tokenizer.pad_token_id
        generation = GenerationConfig(bos_token_id=token_ids.bos, eos_token_id=token_ids.eos, pad_token_id=pad)
        generation.save_pretrained(folder)
    if config.moh.enabled and form == "moh":
        for name in CODE:
            shutil.copyfile(Path(configuration_moh.__file__).with_name(name), folder / name)
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, config.model.tokens)
    write_weights(folder, config, source, dtype, MAX_SHARD_SIZE)
    if form != "official":
        card = model_card(config, dtype=str(precision).removeprefix("torch."), step=step, tokens=tokens)
        (folder / "README.md").write_text(card, encoding="utf-8")
    marker = {
        "format": 1,
        "form": form,
        "step": step,
        "tokens": tokens,
        "tokenizer_sha256": None if tokenizer is None else tokenizer.sha256,
        "files": sorted(os.listdir(folder)),
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def check_exported_tokenizer(folder: Path) -> None:
    """Raise UserError if an exported folder holds another tokenizer than it was written with."""
    expected = read_json_if_any(folder / MARKER, MARKER_CONTENT).get("tokenizer_sha256")
    if expected is not None and (got := load_tokenizer(folder).sha256) != expected:
        raise UserError(
            f"{folder / TOKENIZER_JSON}: expected sha256 {expected}, the tokenizer the model learned with. Got {got}. "
            "Export the model again."
        )
