"""The tokenizer of a configuration: one that is given, or one made from the text of data.inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import Config
from moh_megatron.data.byte_level_bpe import train_byte_level_bpe
from moh_megatron.data.grow import grow_tokenizer
from moh_megatron.data.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer import Tokenizer, load_tokenizer


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
        return {"sha256": given.sha256, "end_of_document": given.eod}
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


def make_tokenizer(config: Config, texts: Iterable[str], folder: Path) -> None:
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
