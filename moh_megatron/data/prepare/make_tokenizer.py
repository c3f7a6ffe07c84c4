"""Makes the tokenizer of a configuration from a sample of its text, unless one is given."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

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
from moh_megatron.io.console import elapsed_bar, progress_bar
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
    entries = config.tokenizer.grow_to or config.model.vocab_size
    logger.info(f"making a tokenizer of {entries:,} entries from data.inputs")
    plans = []
    weights = {source.name: source.weight for source in config.data.sources} or {ONLY: 1.0}
    for name, source in source_configs(config):
        inputs = find_inputs(source.data.inputs)
        most_bytes = round(config.tokenizer.sample_bytes * weights[name] / sum(weights.values()))
        plans.append((inputs, plan_parts(inputs, source.data.text_unit), source.data, most_bytes))
    size = sum(share.goal for _, plan, _, most_bytes in plans for share in _shares(plan, most_bytes))
    with atomic_folder(folder, setting) as partial, ExitStack() as stage:
        bar = stage.enter_context(progress_bar("read text for the tokenizer", size, "B", unit_scale=True))

        def texts() -> Iterator[str]:
            for inputs, plan, data, most_bytes in plans:
                yield from sample_texts(inputs, plan, data, most_bytes, bar.update)
            stage.close()
            stage.enter_context(elapsed_bar(f"learn the {entries:,} entries of the tokenizer"))

        _make(config, texts(), partial)


class _Share(NamedTuple):
    """What a sample takes of a part."""

    most: int
    """Bytes of text at most."""
    size: int
    """Bytes on disk of the whole part."""
    goal: int
    """What the share counts for in the progress of the sample: ``most``, or ``size`` of a part that is smaller."""

    def progress(self, read: int, taken: int) -> int:
        """How much of ``goal`` is reached with ``read`` bytes on disk, which gave ``taken`` bytes of text."""
        fractions = (done / whole for done, whole in ((read, self.size), (taken, self.most)) if whole)
        return int(self.goal * min(1.0, max(fractions, default=1.0)))


def _shares(parts: Sequence[Part], most_bytes: int) -> list[_Share]:
    sizes = [sum(segment.bytes for segment in part) for part in parts]
    total = sum(sizes)
    shares = [most_bytes * size // total if total else most_bytes // len(parts) for size in sizes]
    return [_Share(most, size, min(most, size or most)) for most, size in zip(shares, sizes, strict=True)]


def sample_texts(
    inputs: Sequence[Input], parts: Sequence[Part], data: DataConfig, most_bytes: int, advance: Advance
) -> Iterator[str]:
    """Texts of at most about ``most_bytes`` of UTF-8, in order: from the beginning of each part its share.

    A smaller corpus is returned completely, and the same corpus gives the same sample. Rejects are skipped; raises
    UserError if nothing else is found. ``advance`` is called with what each text adds to the goals of the shares.
    """
    found, rejects = False, []
    for part, share in zip(parts, _shares(parts, most_bytes), strict=True):
        read = taken = reported = 0

        def count(bytes_on_disk: int) -> None:
            nonlocal read
            read += bytes_on_disk

        for segment in part:
            for event in read_segment(inputs[segment.input], segment, data, count) if taken < share.most else ():
                if isinstance(event, Reject) and len(rejects) < QUOTED_REJECTS:
                    rejects.append(f"\n{inputs[segment.input].name}, line {event.line}: {event.reason}")
                if isinstance(event, Chunk):
                    found = True
                    yield event.text
                    taken += len(event.utf8)
                    progress = share.progress(read, taken)
                    advance(progress - reported)
                    reported = progress
                    if taken >= share.most:
                        break
        advance(share.goal - reported)
    if rejects and not found:
        raise UserError("data.inputs holds no text to train a tokenizer on, but rejects:" + "".join(rejects))


def _make(config: Config, texts: Iterable[str], folder: Path) -> None:
    """Train the configured kind on ``texts``, or grow tokenizer.path, and write its files into ``folder``.

    Raises UserError if the texts cannot give so many entries.
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
