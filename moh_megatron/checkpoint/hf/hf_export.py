"""Write a model as a Hugging Face folder that needs no package of ours, and check what was written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PretrainedConfig

from moh_megatron.checkpoint.hf.hf_config import CODE, hf_config
from moh_megatron.checkpoint.hf.hf_extras import GENERATION, Ends, carried_by, stated_ends
from moh_megatron.checkpoint.hf.hf_model import configuration_moh
from moh_megatron.checkpoint.hf.hf_reader import CONFIG, MARKER, NOTE
from moh_megatron.checkpoint.hf.hf_tokenizer import check_generation, write_tokenizer
from moh_megatron.checkpoint.hf.hf_writer import write_weights
from moh_megatron.checkpoint.hf.model_card import model_card
from moh_megatron.checkpoint.hf.skywork import official_config
from moh_megatron.checkpoint.hf.weight_readers import WeightSource
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.names import TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import has_tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder, place_of, refuse_inside
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json_if_any

MAX_SHARD_SIZE = "5GB"
Form = Literal["moh", "llama", "official"]


def check_replaceable(hf_dir: Path, source: Path | None = None) -> None:
    """Raise UserError unless ``hf_dir`` is absent, empty, or holds an earlier export and nothing else.

    Inside the ``source`` it is made of it must not lie either: a checkpoint holds what its manifest says.
    """
    if source is not None:
        refuse_inside(hf_dir, source)
    place = place_of(hf_dir)
    if not place.exists():
        return
    remedy = "Name another folder, or move this one away."
    if not place.is_dir():
        raise UserError(f"{hf_dir}: must be a folder to export into. Got a file. {remedy}")
    present = {entry.name for entry in place.iterdir()}
    if not present:
        return
    try:
        ours = {MARKER, *json.loads((place / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{hf_dir}: must be empty or an earlier export. Got a folder of something else. {remedy}"
        ) from None
    if stray := sorted(present - ours):
        raise UserError(f"{hf_dir}: holds files that are not of the earlier export: {', '.join(stray[:5])}. {remedy}")


@contextmanager
def replacing(hf_dir: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``hf_dir`` when the block ends well and vanishes when it does not.

    Raises:
        UserError: ``hf_dir`` holds something other than an earlier export.
        Fault: the disk is full or refuses.
    """
    check_replaceable(hf_dir)
    with atomic_folder(hf_dir) as folder:
        yield folder


def _settings(config: Config, dtype: torch.dtype, ends: Ends, form: Form) -> PretrainedConfig | dict[str, Any]:
    if form == "llama" and config.moh.enabled:
        raise UserError(
            "--format llama needs a dense model: LlamaForCausalLM has no routers, and would use every head. "
            "Got moh.enabled: true; use --format moh."
        )
    return official_config(config, dtype, ends) if form == "official" else hf_config(config, dtype, ends)


def check_form(config: Config, form: Form) -> None:
    """Raise UserError where ``form`` cannot express the model."""
    _settings(config, torch.float32, Ends(), form)


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
    """Fill an empty ``folder`` with what AutoModelForCausalLM and AutoTokenizer open; ``replacing`` puts it in place.

    Args:
        tokenizer_dir: holds the tokenizer's files, where there is one, and its ``companions``, which go before what
            the tokenizer says.
        dtype: precision of the written weights; None leaves each tensor its own.
        step, tokens: training so far, for the model card.
        form: moh, with the code of MoH where the model has it; llama, for a dense model; official, LLaMA's names and
            settings alone, as SkyworkAI's modelling file takes them.

    Raises:
        UserError: weights, tokenizer and configuration do not fit, or the form cannot express the model.
    """
    tokenizer = load_tokenizer(tokenizer_dir) if has_tokenizer(tokenizer_dir) else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.tokens:
        raise UserError(
            f"{tokenizer_dir}: the tokenizer must have at most model.vocab_size ({config.model.tokens}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    carried = carried_by(tokenizer_dir)
    check_generation(tokenizer_dir, config.model.tokens)
    stated = stated_ends(carried)
    ends = stated or (Ends() if tokenizer is None else Ends.of(tokenizer))
    precision = dtype or source.dtype(rules(config)[0])
    settings = _settings(config, precision, ends, form)
    if isinstance(settings, dict):
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        settings.save_pretrained(folder)
    if GENERATION in carried:
        (folder / GENERATION).write_bytes(carried[GENERATION])
    else:
        pad = ends.pad if tokenizer is None or stated else tokenizer.pad_token_id
        GenerationConfig(bos_token_id=ends.bos, eos_token_id=ends.eos, pad_token_id=pad).save_pretrained(folder)
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


def check_tokenizer(folder: Path) -> None:
    """Raise UserError where an exported folder holds another tokenizer than it was written with."""
    expected = read_json_if_any(folder / MARKER, NOTE).get("tokenizer_sha256")
    if expected is not None and (got := load_tokenizer(folder).sha256) != expected:
        raise UserError(
            f"{folder / TOKENIZER_JSON}: expected sha256 {expected}, the tokenizer the model learned with. Got {got}. "
            "Export the model again."
        )
