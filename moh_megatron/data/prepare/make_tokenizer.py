"""The tokenizer of a configuration: one that is given, or one made from the text of data.inputs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import ONLY
from moh_megatron.data.prepare.inputs import find_inputs, plan_parts
from moh_megatron.data.prepare.progress import progress_bar
from moh_megatron.data.prepare.publish import published_folder
from moh_megatron.data.prepare.sample import sample_texts
from moh_megatron.data.source_configs import source_configs
from moh_megatron.data.tokenizer.byte_level_bpe import train_byte_level_bpe
from moh_megatron.data.tokenizer.grow import grow_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError


def given_tokenizer(config: Config) -> Tokenizer | None:
    """tokenizer.path as it is, or None where one must be made. Raises UserError where it has too many entries."""
    path = config.tokenizer.path
    if path is None or config.tokenizer.grow_to is not None:
        return None
    given = load_tokenizer(path)
    if given.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path: {path} has {given.vocab_size} entries, more than model.vocab_size "
            f"({config.model.vocab_size}). Raise model.vocab_size to at least {given.vocab_size}."
        )
    return given


def tokenizer_settings(config: Config, given: Tokenizer | None) -> dict[str, Any]:
    """What decides the tokenizer, besides the text."""
    if given is not None:
        return {
            "sha256": given.sha256,
            # The manifest's settings of datasets prepared so far have this key: they must be found equal.
            "end_of_document": given.eos_token_id,
            "split_special_tokens": given.split_special_tokens,
        }
    settings = config.tokenizer
    if settings.path is not None:
        base = load_tokenizer(settings.path)
        return {"sha256": base.sha256, "grow_to": settings.grow_to, "sample_bytes": settings.sample_bytes}
    return {
        "algorithm": settings.algorithm,
        "vocab_size": config.model.vocab_size,
        "character_coverage": settings.character_coverage,
        "user_symbols": list(settings.user_symbols),
        "sample_bytes": settings.sample_bytes,
    }


def train_on_inputs(config: Config, folder: Path) -> None:
    """Make the tokenizer from a sample of data.inputs, or of all sources by their weights, into the new ``folder``.

    It appears whole. Raises UserError.
    """
    plans = []
    weights = {source.name: source.weight for source in config.data.sources} or {ONLY: 1.0}
    for name, each in source_configs(config):
        inputs = find_inputs(each.data.inputs)
        most = round(config.tokenizer.sample_bytes * weights[name] / sum(weights.values()))
        plans.append((inputs, plan_parts(inputs, each.data.text_unit), each.data, most))
    size = sum(segment.bytes for _, plan, _, _ in plans for part in plan for segment in part)
    with published_folder(folder) as partial, progress_bar("read for tokenizer", size) as bar:
        texts = chain.from_iterable(
            sample_texts(inputs, plan, data, most, bar.update) for inputs, plan, data, most in plans
        )
        _make(config, texts, partial)


def _make(config: Config, texts: Iterable[str], folder: Path) -> None:
    """Train the configured kind on ``texts``, or grow tokenizer.path, and write its files into ``folder``.

    Raises UserError where the texts cannot give so many entries.
    """
    settings, size = config.tokenizer, config.model.vocab_size
    if settings.path is not None:
        assert settings.grow_to is not None
        grow_tokenizer(load_tokenizer(settings.path), texts, entries=settings.grow_to, out_dir=folder)
    elif settings.algorithm == "byte_level_bpe":
        train_byte_level_bpe(texts, vocab_size=size, user_symbols=settings.user_symbols, out_dir=folder)
    else:
        train_tokenizer(
            texts,
            vocab_size=size,
            character_coverage=settings.character_coverage,
            out_dir=folder,
            model_type="unigram" if settings.algorithm == "sentencepiece_unigram" else "bpe",
            user_symbols=settings.user_symbols,
        )
