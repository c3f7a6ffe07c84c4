"""Makes the tokenizer of a configuration from a sample of its text, unless one is given."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from moh_megatron.config.schema import Config, DataConfig
from moh_megatron.config.source_weights import ONLY
from moh_megatron.data.prepare.chunks import Chunk
from moh_megatron.data.prepare.inputs import Input, Part, find_inputs, plan_parts
from moh_megatron.data.prepare.lines import Advance
from moh_megatron.data.prepare.read_documents import QUOTED_REJECTS, Reject, read_segment
from moh_megatron.data.source_configs import source_configs
from moh_megatron.data.tokenizer.byte_level_bpe import train_byte_level_bpe
from moh_megatron.data.tokenizer.grow import grow_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError

logger = logging.getLogger(__name__)


def given_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer of tokenizer.path, or None if one must be made. Raises UserError if it has too many entries."""
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
    """What determines the tokenizer besides the text; part of the manifest's settings."""
    if given is not None:
        return {
            "sha256": given.sha256,
            # The manifests of existing datasets use this key, and their settings are compared with these.
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


def train_on_inputs(config: Config, folder: Path, setting: str | None = "data.dir") -> None:
    """Make the tokenizer in the new ``folder``, from a sample of data.inputs, or of all sources by their weights.

    The folder appears complete or not at all. Raises UserError.
    """
    plans = []
    weights = {source.name: source.weight for source in config.data.sources} or {ONLY: 1.0}
    for name, source in source_configs(config):
        inputs = find_inputs(source.data.inputs)
        most_bytes = round(config.tokenizer.sample_bytes * weights[name] / sum(weights.values()))
        plans.append((inputs, plan_parts(inputs, source.data.text_unit), source.data, most_bytes))
    size = sum(segment.bytes for _, plan, _, _ in plans for part in plan for segment in part)
    with (
        atomic_folder(folder, setting) as partial,
        progress_bar("read for tokenizer", size, "B", unit_scale=True) as bar,
    ):
        texts = chain.from_iterable(
            sample_texts(inputs, plan, data, most_bytes, bar.update) for inputs, plan, data, most_bytes in plans
        )
        _make(config, texts, partial)


def sample_texts(
    inputs: Sequence[Input], parts: Sequence[Part], data: DataConfig, most_bytes: int, advance: Advance
) -> Iterator[str]:
    """Texts of at most about ``most_bytes`` of UTF-8, in order: from the beginning of each part its share.

    A smaller corpus is returned completely, and the same corpus gives the same sample. Rejects are skipped; raises
    UserError if nothing else is found.
    """
    found, rejects = False, []
    total = sum(segment.bytes for part in parts for segment in part)
    for part in parts:
        size = sum(segment.bytes for segment in part)
        left = most_bytes * size // total if total else most_bytes // len(parts)
        for segment in part:
            for event in read_segment(inputs[segment.input], segment, data, advance) if left > 0 else ():
                if isinstance(event, Reject) and len(rejects) < QUOTED_REJECTS:
                    rejects.append(f"\n{inputs[segment.input].name}, line {event.line}: {event.reason}")
                if isinstance(event, Chunk):
                    found = True
                    yield event.text
                    left -= len(event.utf8)
                    if left <= 0:
                        break
    if rejects and not found:
        raise UserError("data.inputs holds no text to train a tokenizer on, but rejects:" + "".join(rejects))


def _then_say(texts: Iterable[str], message: str) -> Iterator[str]:
    """The texts, and a message once all are taken: the learning that follows shows nothing."""
    yield from texts
    logger.info(message)


def _make(config: Config, texts: Iterable[str], folder: Path) -> None:
    """Train the configured kind on ``texts``, or grow tokenizer.path, and write its files into ``folder``.

    Raises UserError if the texts cannot give so many entries.
    """
    settings, size = config.tokenizer, config.model.vocab_size
    texts = _then_say(texts, f"all text is read: learning a vocabulary of {settings.grow_to or size:,} entries")
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
