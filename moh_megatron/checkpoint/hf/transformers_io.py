"""Opens models and tokenizers of Hugging Face folders with Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from moh_megatron.checkpoint.hf.hf_config import hf_config
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_extras import SpecialTokenIds
from moh_megatron.checkpoint.hf.hf_folder import CONFIG
from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM
from moh_megatron.checkpoint.hf.hf_reader import check_index
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.names import TOKENIZER_CONFIG
from moh_megatron.data.tokenizer.panics import panics_as_value_errors
from moh_megatron.io.console import warnings_hidden
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any
from moh_megatron.io.small_file import check_small_files


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of Transformers and three of its warnings: that Python cannot import a folder's name, that
    one setting of generation has no effect beside another, and that a general class opens a configuration."""
    names = (
        "transformers.dynamic_module_utils",
        "transformers.generation.configuration_utils",
        "transformers.configuration_utils",
    )
    had_bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings_hidden(*names):
            yield
    finally:
        if had_bars:
            enable_progress_bar()


@contextmanager
def as_user_error(path: Path, what: str) -> Iterator[None]:
    """Turn every error of Transformers, while it opens ``what`` from ``path``, into a UserError with its first line."""
    try:
        with panics_as_value_errors():
            yield
    except UserError:
        raise
    except Exception as error:  # Unchecked values reach the code of Transformers, which may raise anything.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: must hold {what} that Transformers opens. It does not: {reason}") from error


@contextmanager
def _code_refused(folder: Path) -> Iterator[None]:
    """Turn the error of Transformers about a folder that needs its own code into a UserError that names this code."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        files = (CONFIG, "the settings of a Hugging Face model"), (TOKENIZER_CONFIG, "the settings of a tokenizer")
        maps = [read_json_if_any(folder / file, expected).get("auto_map") for file, expected in files]
        classes = [value for found in maps for value in (found.values() if isinstance(found, dict) else [found])]
        names = {str(name) for value in classes for name in (value if isinstance(value, list) else [value]) if name}
        raise UserError(
            f"{folder}: must hold a model and a tokenizer that Transformers or this project knows. Got classes of its "
            f"own: {', '.join(sorted(names))}. Read that code and, if you trust it, run it with --trust-remote-code."
        ) from None


def _is_moh(folder: Path) -> bool:
    """Whether a folder holds a MoH model of this project, whose code is in this package."""
    content = read_json(folder / CONFIG, "the settings of a Hugging Face model")
    return content.get("model_type") == MoHConfig.model_type


def open_causal_lm(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> torch.nn.Module:
    """Load the model of a folder, in evaluation mode; ``dtype`` None keeps the precision of its weights.

    Code in the folder runs only with ``trust_remote_code``. Without it a MoH model of this project opens by the classes
    of this package, any other by those of Transformers. Raises UserError if it does not load.
    """
    check_small_files(folder)
    try:
        with _code_refused(folder):
            if _is_moh(folder) and not trust_remote_code:
                model = MoHForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
            else:
                model = AutoModelForCausalLM.from_pretrained(
                    folder, trust_remote_code=trust_remote_code, dtype=dtype or "auto"
                )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(
            f"{folder}: must hold a causal language model that Transformers opens. It does not load: {error}"
        ) from error
    return model.eval()


def open_export(folder: Path) -> PreTrainedModel:
    """Load a folder that this project wrote, in fp32, with the code in the folder."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def open_without_folder_code(folder: Path, config: Config) -> PreTrainedModel:
    """Load any folder in fp32 without running code in it; Transformers itself reads its config.json.

    A folder of the official form does not state how its heads are routed: ``config`` does.

    Raises:
        UserError: Transformers does not open the folder.
    """
    check_index(folder)
    check_small_files(folder)
    model_class = MoHForCausalLM if config.moh.enabled else LlamaForCausalLM
    is_official = config.moh.enabled and not HFConfigReader(folder).is_moh
    settings = hf_config(config, torch.float32, SpecialTokenIds()) if is_official else None
    with quiet(), as_user_error(folder, "a model"):
        return model_class.from_pretrained(folder, config=settings, dtype=torch.float32).eval()


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder with a model, or of a checkpoint's folder ``tokenizer``.

    Code in the folder runs only with ``trust_remote_code``. Raises UserError where the tokenizer needs it, or does not
    open.
    """
    check_small_files(folder)
    with as_user_error(folder, "a tokenizer"), _code_refused(folder):
        if not (folder / CONFIG).is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        known = {"config": MoHConfig.from_pretrained(folder)} if _is_moh(folder) and not trust_remote_code else {}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **known)
