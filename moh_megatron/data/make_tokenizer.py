"""The tokenizer of a configuration: one that is given, or one made from the text of data.inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import Config
from moh_megatron.data.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer import Tokenizer, load_tokenizer


def given_tokenizer(config: Config) -> Tokenizer | None:
    """tokenizer.path, or None where a tokenizer must be made. Raises UserError where it has too many entries."""
    path = config.tokenizer.path
    if path is None:
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
    return {
        "trained": "sentencepiece bpe",
        "vocab_size": config.model.vocab_size,
        "character_coverage": config.tokenizer.character_coverage,
        "sample_bytes": config.tokenizer.sample_bytes,
    }


def make_tokenizer(config: Config, texts: Iterable[str], folder: Path) -> None:
    """Train the configured kind on ``texts`` and write its files into ``folder``. Raises UserError."""
    train_tokenizer(
        texts,
        vocab_size=config.model.vocab_size,
        character_coverage=config.tokenizer.character_coverage,
        out_dir=folder,
    )
