"""Models and tokenizers of Hugging Face folders, our exports and others, opened by Transformers to be judged."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from moh_megatron.io.errors import UserError


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its bars, and without its remarks on folders whose names Python could not import and on
    settings of generation that another one makes void."""
    names = ("transformers.dynamic_module_utils", "transformers.generation.configuration_utils")
    remarks, bars = [logging.getLogger(name) for name in names], is_progress_bar_enabled()
    levels = [each.level for each in remarks]
    for each in remarks:
        each.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        yield
    finally:
        for each, level in zip(remarks, levels, strict=True):
            each.setLevel(level)
        if bars:
            enable_progress_bar()


@contextmanager
def refusing(folder: Path, what: str) -> Iterator[None]:
    """Whatever Transformers raises on ``what`` it opens from ``folder`` becomes a UserError with its first line."""
    try:
        yield
    except Exception as error:  # values of any kind reach its code unchecked, which then raises anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{folder}: must hold {what} that Transformers opens. It does not: {reason}") from error


def open_causal_lm(folder: Path, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model of a folder, in evaluation mode, in the precision of its weights where ``dtype`` is None.

    Raises UserError where it does not load.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype or "auto")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"{folder}: must hold a causal language model that Transformers opens. It does not load: {error}"
        ) from error
    return model.eval()


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder with a model, or of a checkpoint."""
    if (folder / "config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return PreTrainedTokenizerFast.from_pretrained(folder)
