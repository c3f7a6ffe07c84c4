"""Imports a Hugging Face folder as a checkpoint: a LLaMA, or a model that this project exported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_extras import TOKEN_IDS, HFExtras, read_extras
from moh_megatron.checkpoint.hf.hf_folder import MARKER
from moh_megatron.checkpoint.hf.hf_import_config import build_config, check_target, import_config, refuse_official
from moh_megatron.checkpoint.hf.hf_reader import HFWeights, open_weights
from moh_megatron.checkpoint.hf.streaming import row_ranges
from moh_megatron.checkpoint.hf.weight_readers import HFSource, all_chunks
from moh_megatron.checkpoint.layout import read_weights
from moh_megatron.checkpoint.mapping import check_names_and_shapes, rules
from moh_megatron.config.parameter_count import parameter_count
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.names import TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.errors import UserError
from moh_megatron.io.safetensors_stream import WEIGHT_TYPES, Scratch

logger = logging.getLogger(__name__)

NewTensors = Callable[[Config], Iterable[tuple[str, Tensor]]]
"""Returns the tensors that a MoH model has and its dense counterpart has not, under Hugging Face's names."""

AUTO_VERIFY_PARAMETERS = 100_000_000
"""Up to this size a conversion is verified even without --verify. It takes the memory of the model in fp32."""

_MAX_PADDING = 1024
"""Vocabularies exceed the tokenizer's entries by up to this many rows, for round sizes and future tokens."""
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Old LLaMA-2 folders store RoPE's frequencies, which follow from config.json."""


def auto_verify(config: Config) -> bool:
    """Whether a model is small enough to be verified without --verify."""
    return parameter_count(config.model, config.moh).total <= AUTO_VERIFY_PARAMETERS


def hf_to_megatron(
    hf_dir: Path,
    save_dir: Path,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    new_tensors: NewTensors,
    allow_pickle: bool = False,
    verify: bool = False,
) -> None:
    """Write the model of ``hf_dir`` as the checkpoint ``save_dir``; every tensor keeps its precision.

    Args:
        path, overrides: the configuration beside config.json; ``moh.enabled`` makes a dense model a MoH model.
        new_tensors: returns the tensors that a MoH model needs besides the weights of a dense one.
        verify: open both sides in fp32 and compare them layer by layer. A dense model that becomes a MoH model is
            compared with all heads active, and up to ``AUTO_VERIFY_PARAMETERS`` parameters also without ``verify``.

    Raises:
        UserError: the folder is broken, its weights do not fit its config.json, ``save_dir`` is not empty or lies in
            ``hf_dir``.
        Fault: the two sides differ by ``TOLERANCE`` or more, or writing fails. Nothing is left behind then.
    """
    check_target(save_dir, hf_dir)
    with atomic_folder(save_dir) as folder:
        config, source_config = _write(
            folder, hf_dir, save_dir, path, overrides, new_tensors=new_tensors, allow_pickle=allow_pickle
        )
        upcycled = config.moh.enabled and not source_config.moh.enabled
        if not verify and not (upcycled and auto_verify(config)):
            if upcycled:
                logger.info("The checkpoint was not compared with the dense model: at this size that needs --verify.")
            return
        # Imported here, because Megatron-core and Transformers take long to load.
        from moh_megatron.checkpoint.hf import transformers_io
        from moh_megatron.checkpoint.hf import verify as verification

        if upcycled:
            logger.info("with all heads active, against the dense model:")
            config = replace(config, moh=replace(config.moh, active_heads=config.model.num_attention_heads))
        comparison = verification.compare_forms(
            config, read_weights(folder), lambda: transformers_io.open_without_folder_code(hf_dir, source_config)
        )
        logger.info(str(comparison))
        verification.require_agreement(comparison, f"{save_dir}: the checkpoint's logits differ from those of {hf_dir}")


def _write(
    folder: Path,
    hf_dir: Path,
    save_dir: Path,
    path: Path | None,
    overrides: Sequence[str],
    *,
    new_tensors: NewTensors,
    allow_pickle: bool,
) -> tuple[Config, Config]:
    """Fill the empty ``folder``; returns its configuration, and the one that config.json alone describes."""
    with open_weights(hf_dir, allow_pickle=allow_pickle) as weights:
        reader = HFConfigReader(hf_dir)
        refuse_official(reader, hf_dir)
        config = import_config(hf_dir, save_dir, path, overrides, torch.bfloat16 in weights.dtypes)
        tokenizer = find_tokenizer(hf_dir, config)
        extras = HFExtras(tokenizer, read_extras(hf_dir))
        check_extras(hf_dir, extras, config.model.tokens)
        added = dict(new_tensors(config)) if config.moh.enabled and not reader.is_moh else {}
        check_weights(weights, added, config)
        source = HFSource(weights, added)
        dtypes = {rule.megatron: source.dtype(rule) for rule in rules(config)}
        write_checkpoint(folder, config, dtypes, all_chunks(source, config), extras)
        return config, build_config(reader, save_dir, None, (), torch.bfloat16 in weights.dtypes)


def find_tokenizer(hf_dir: Path, config: Config) -> Tokenizer | None:
    """Load the tokenizer of a folder; warns and returns None if there is none.

    Raises:
        UserError: it is broken, or has more entries than the model's vocabulary, or many fewer.
    """
    if not has_tokenizer(hf_dir):
        logger.warning(f"{hf_dir} has no tokenizer ({TOKENIZER_JSON} or tokenizer.model): only weights are converted.")
        return None
    tokenizer = load_tokenizer(hf_dir)
    if tokenizer.vocab_size > config.model.tokens:
        raise UserError(
            f"{tokenizer.file}: the tokenizer must have at most vocab_size ({config.model.tokens}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    # A model trained by this project may have a vocabulary of any size above the tokenizer's.
    if tokenizer.vocab_size + _MAX_PADDING < config.model.tokens and not (hf_dir / MARKER).is_file():
        raise UserError(
            f"{tokenizer.file}: the tokenizer must have about vocab_size ({config.model.tokens}) entries, at most "
            f"{_MAX_PADDING} fewer for padding. Got {tokenizer.vocab_size}: another model's. Without one in the "
            "folder the weights alone are converted."
        )
    return tokenizer


def check_extras(hf_dir: Path, extras: HFExtras, vocab_size: int) -> None:
    """Raise UserError if an export of a model of ``vocab_size`` tokens could not include the tokenizer and extras."""
    tokenizer = extras.tokenizer
    if tokenizer is None and not extras.files.keys() - {TOKEN_IDS}:
        return
    # Imported here, because Transformers takes long to load.
    from moh_megatron.checkpoint.hf import hf_tokenizer

    hf_tokenizer.check_generation(hf_dir, vocab_size)
    if tokenizer is not None:
        hf_tokenizer.check_tokenizer(tokenizer, vocab_size)


def check_weights(weights: HFWeights, added: Mapping[str, Tensor], config: Config) -> None:
    """Raise UserError unless ``weights`` and ``added`` together are the tensors of ``config``."""
    tied = {"lm_head.weight"} if config.model.tie_word_embeddings else set()
    held = {
        name: entry
        for name, entry in weights.entries.items()
        if name not in tied and not name.endswith(_IGNORED_SUFFIX)
    }
    table = rules(config)
    shapes = {name: shape for rule in table for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)}
    check_names_and_shapes({**added, **held}, shapes, f"{weights.folder} (as config.json describes it)")
    for name, dtype in ((name, rule.dtype) for rule in table for name in rule.hf if name in held):
        got = held[name].dtype
        if got != dtype if dtype is not None else not got.is_floating_point:
            raise UserError(f"{weights.location(name)} must be of {dtype or WEIGHT_TYPES}. Got {got}.")
    scratch = Scratch()
    for name in tied & weights.entries.keys():
        pair = (name, "model.embed_tokens.weight")
        head, embedding = (weights.entries[tensor_name] for tensor_name in pair)
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        for start, stop in row_ranges(config.model.tokens, 4 * config.model.hidden_size) if same else ():
            scratch.reset()
            same = same and torch.equal(*(weights.rows(tensor_name, start, stop, scratch) for tensor_name in pair))
        if not same:
            raise UserError(
                f"{weights.folder}: {name} differs from {pair[1]}, but config.json says tie_word_embeddings: true. "
                f"Set it to false, or leave {name} out."
            )
