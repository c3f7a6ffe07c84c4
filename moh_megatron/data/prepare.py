"""Raw text -> tokenizer, Megatron .bin/.idx of two splits and a manifest: a folder that is whole or not there."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moh_megatron.config.errors import Fault, UserError
from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    FileRecord,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    load_manifest,
    record_file,
)
from moh_megatron.data.ngrams import baselines
from moh_megatron.data.publish import published_folder
from moh_megatron.data.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.text import find_files, read_documents
from moh_megatron.data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARACTERS = 1 << 20
"""Text encoded at once: enough to keep the tokenizer's threads busy, little enough to stay small in memory."""


def prepare(config: Config) -> Manifest:
    """Make the dataset of ``config.data`` in its folder, or find it there already made.

    The folder then holds train.bin, train.idx, validation.bin, validation.idx, tokenizer/ and manifest.json. It appears
    complete or not at all, and an earlier dataset is replaced only when the new one is complete.

    Raises UserError for input, settings and sizes the user can mend, Fault where the disk fails.
    """
    folder = data_dir(config)
    given = None if config.tokenizer.path is None else load_tokenizer(config.tokenizer.path)
    if given is not None and given.vocab_size > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path: {config.tokenizer.path} has {given.vocab_size} entries, more than model.vocab_size "
            f"({config.model.vocab_size}). Raise model.vocab_size to at least {given.vocab_size}."
        )
    paths = find_files(config.data.inputs)
    inputs = tuple(_record_input(path) for path in paths)
    settings = _settings(config, given)
    if (ready := _existing(folder, inputs, settings)) is not None:
        ready.check_fits(config)
        print(f"{folder}: already prepared from the same text with the same settings")
        return ready
    try:
        with published_folder(folder) as partial:
            manifest = _make(config, paths, inputs, settings, given, partial)
            (partial / MANIFEST).write_bytes(manifest.to_json())
    except OSError as error:
        raise Fault(
            f"Cannot write the dataset {folder}: {error.strerror or error}. Free some space there or set data.dir to "
            "another disk, then run the same command again. An earlier dataset in its place is untouched."
        ) from error
    return manifest


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: by a hash of its text alone, so that a growing corpus moves none."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < fraction * 2**64


def _record_input(path: Path) -> FileRecord:
    try:
        return record_file(path, str(path))
    except OSError as error:
        raise UserError(f"data.inputs: {path} cannot be read ({error.strerror}).") from None


def _settings(config: Config, given: Tokenizer | None) -> dict[str, Any]:
    if given is None:
        tokenizer = {
            "trained": "sentencepiece bpe",
            "vocab_size": config.model.vocab_size,
            "character_coverage": config.tokenizer.character_coverage,
        }
    else:
        tokenizer = {"sha256": given.sha256, "end_of_document": given.eod}
    return {
        "tokenizer": tokenizer,
        "text_key": config.data.text_key,
        "text_unit": config.data.text_unit,
        "validation_fraction": config.data.validation_fraction,
        "ngram_baselines": config.data.ngram_baselines,
    }


def _existing(folder: Path, inputs: tuple[FileRecord, ...], settings: dict[str, Any]) -> Manifest | None:
    """The manifest of the dataset in ``folder`` where it is whole and the one asked for."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data.dir: {folder} exists and is not a prepared dataset. Name another folder, or remove it.")
    try:
        manifest = load_manifest(folder)
    except UserError:
        return None
    same = [(file.bytes, file.sha256) for file in manifest.inputs] == [(file.bytes, file.sha256) for file in inputs]
    return manifest if same and manifest.settings == settings else None


def _make(
    config: Config,
    paths: list[Path],
    inputs: tuple[FileRecord, ...],
    settings: dict[str, Any],
    given: Tokenizer | None,
    partial: Path,
) -> Manifest:
    """Fill ``partial`` with everything but the manifest."""
    if given is None:
        tokenizer = _train(config, paths, partial / "tokenizer")
    else:
        tokenizer = given
        given.save(partial / "tokenizer")
    dtype, splits = _encode(config, paths, tokenizer, partial)
    manifest = Manifest(
        format=FORMAT,
        inputs=inputs,
        settings=settings,
        tokenizer=TokenizerRecord(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod),
        dtype=dtype,
        train=splits["train"],
        validation=splits["validation"],
        baselines=None,
        versions=_versions(),
        command=shlex.join(sys.argv),
    )
    manifest.check_fits(config)
    if not config.data.ngram_baselines:
        return manifest
    prefixes = [str(partial / name) for name in SPLITS]
    return replace(manifest, baselines=baselines(prefixes[0], prefixes[1], tokenizer.vocab_size))


def _train(config: Config, paths: list[Path], folder: Path) -> Tokenizer:
    with _progress(paths, "train tokenizer") as bar:
        train_tokenizer(
            read_documents(paths, config.data, bar.update),
            vocab_size=config.model.vocab_size,
            character_coverage=config.tokenizer.character_coverage,
            out_dir=folder,
        )
    return load_tokenizer(folder)


def _encode(
    config: Config, paths: list[Path], tokenizer: Tokenizer, partial: Path
) -> tuple[str, dict[str, SplitRecord]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each missing GPU library is announced
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # imports torch: 7 s

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {name: IndexedDatasetBuilder(str(partial / f"{name}.bin"), dtype=dtype) for name in SPLITS}
    documents, tokens, text_bytes = (dict.fromkeys(SPLITS, 0) for _ in range(3))
    started = time.monotonic()
    with _progress(paths, "encode") as bar:
        for batch in _batches(read_documents(paths, config.data, bar.update)):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                name = "validation" if held_out(text, config.data.validation_fraction) else "train"
                ids.append(tokenizer.eod)
                builders[name].add_document(ids, [len(ids)])  # pyright: ignore[reportArgumentType]
                documents[name] += 1
                tokens[name] += len(ids)
                text_bytes[name] += len(text.encode("utf-8"))
            rate = sum(text_bytes.values()) / 1e6 / (time.monotonic() - started)
            bar.set_postfix_str(f"{sum(documents.values())} documents, {rate:.1f} MB/s of text")
    for name in SPLITS:
        builders[name].finalize(str(partial / f"{name}.idx"))
    splits = {
        name: SplitRecord(
            documents=documents[name],
            tokens=tokens[name],
            text_bytes=text_bytes[name],
            files=tuple(record_file(partial / f"{name}.{end}", f"{name}.{end}") for end in ("bin", "idx")),
        )
        for name in SPLITS
    }
    return dtype.__name__, splits


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _progress(paths: list[Path], what: str) -> tqdm:
    """A bar over the bytes of the files on disk."""
    return tqdm(total=sum(path.stat().st_size for path in paths), desc=what, unit="B", unit_scale=True)


def _versions() -> dict[str, str]:
    packages = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "torch")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
