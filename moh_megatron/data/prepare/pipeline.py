"""Raw text -> tokenizer, Megatron .bin/.idx of two splits and a manifest: a folder that is whole or not there.

The work is done part by part in a folder beside it, ``<data.dir>.parts``, where a killed run or another shard finds
what is finished; the last step puts the parts together.
"""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset_manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    FileRecord,
    InputRecord,
    Manifest,
    TokenizerRecord,
    hash_file,
    load_manifest,
)
from moh_megatron.data.prepare.indexed_writer import token_dtype
from moh_megatron.data.prepare.inputs import find_inputs
from moh_megatron.data.prepare.make_tokenizer import given_tokenizer, train_on_inputs
from moh_megatron.data.prepare.merge import merge_parts, write_rejects
from moh_megatron.data.prepare.ngrams import baselines
from moh_megatron.data.prepare.progress import progress_bar
from moh_megatron.data.prepare.publish import published_folder
from moh_megatron.data.prepare.working_folder import REJECTS, PrepareJob
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import Fault, UserError

logger = logging.getLogger(__name__)

ALREADY = "already prepared from the same text with the same settings"
SOON_MADE_AGAIN = 100_000_000
"""Bytes of text whose parts are not kept for another try where the dataset cannot feed the model."""


def prepare(config: Config) -> Manifest:
    """Make the dataset of ``config.data`` in its folder, or find it there already made.

    The folder then holds train.bin, train.idx, validation.bin, validation.idx, rejects.jsonl, tokenizer/ and
    manifest.json. It appears complete or not at all, and an earlier dataset is replaced only when the new one is
    complete. What shards have finished is taken from there, the rest is done first.

    Raises UserError for input, settings and sizes the user can mend, Fault where the disk fails.
    """
    folder = data_dir(config)
    work = PrepareJob(config, find_inputs(config.data.inputs), given_tokenizer(config))
    if (ready := _existing(folder, work)) is not None:
        _check_share(folder, ready, config.data.max_reject_fraction)
        ready.check_fits(config)
        logger.info(f"{folder}: {ALREADY}")
        return ready
    with _disk_faults(folder), work:
        tokenizer = work.tokenizer()
        work.make_parts(tokenizer, 1, 1)
        with published_folder(folder) as partial:
            manifest = _merge(config, work, tokenizer, partial)
        work.remove()
    return manifest


def prepare_shard(config: Config, shard: int, shards: int) -> None:
    """Do share ``shard`` (from 1) of ``shards`` of the work for ``prepare``, which puts it together. Raises as it does.

    Does nothing where ``prepare`` would find the dataset made.
    """
    folder = data_dir(config)
    given = shard_tokenizer(config)
    work = PrepareJob(config, find_inputs(config.data.inputs), given)
    if _existing(folder, work) is not None:
        logger.info(f"{folder}: {ALREADY}")
        return
    with _disk_faults(folder), work:
        work.make_parts(given, shard, shards)


def shard_tokenizer(config: Config) -> Tokenizer:
    """The given one. Raises UserError where none is: each shard would train it, and none would wait for another."""
    given = given_tokenizer(config)
    if given is None:
        raise UserError(
            "data.shard needs a tokenizer that is there. Make it first, with pipelines/prepare_data.py CONFIG "
            "--tokenizer DIR, and set tokenizer.path=DIR."
        )
    return given


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Fault(
            f"Cannot write the dataset {folder}: {error.strerror or error}. Free some space there or set data.dir to "
            "another disk, then run the same command again. An earlier dataset in its place is untouched."
        ) from error


def prepare_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """Make in the new ``folder`` the tokenizer of data.inputs, or of all sources; tokenizer.path counts only where
    tokenizer.grow_to does. Raises UserError.
    """
    if folder.exists():
        raise UserError(f"--tokenizer: {folder} exists already. Name a new folder.")
    if config.tokenizer.grow_to is None:
        config = replace(config, tokenizer=replace(config.tokenizer, path=None))
    with _disk_faults(folder):
        train_on_inputs(config, folder)
    return load_tokenizer(folder)


def _existing(folder: Path, work: PrepareJob) -> Manifest | None:
    """The manifest of the dataset in ``folder`` where it is whole and the one asked for."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data.dir: {folder} exists and is not a prepared dataset. Name another folder, or remove it.")
    try:
        manifest = load_manifest(folder)
    except UserError:
        return None
    return manifest if manifest.settings == work.settings and work.same_inputs(manifest.inputs) else None


def _check_share(folder: Path, ready: Manifest, limit: float) -> None:
    """Raise UserError where a dataset that is there was made with a larger share of rejects than is allowed now."""
    counts = ready.counts
    if counts.rejects > limit * counts.records:
        raise UserError(
            f"{folder}: {counts.rejects:,} of {counts.records:,} records were rejected when it was made, more than "
            f"data.max_reject_fraction ({limit:g}); {folder / REJECTS} lists them. Mend the input, or raise "
            "data.max_reject_fraction."
        )


def _merge(config: Config, work: PrepareJob, tokenizer: Tokenizer, partial: Path) -> Manifest:
    """Fill ``partial``. Raises UserError where too much was rejected or the dataset cannot feed the model."""
    data = config.data
    work.check_rejects()
    dtype = token_dtype(tokenizer.vocab_size)
    with progress_bar("put together", len(work.parts), "part") as bar:
        merged = merge_parts(
            work.parts,
            partial,
            dtype,
            validation_fraction=data.validation_fraction,
            deduplicate=data.deduplicate,
            advance=bar.update,
        )
    write_rejects(partial / REJECTS, work.rejects())
    tokenizer.save(partial / "tokenizer")
    manifest = Manifest(
        format=FORMAT,
        inputs=tuple(
            InputRecord(file.path, file.bytes, work.sha256(file), file.modified_ns)
            for each in work.inputs
            for file in each.files
        )
        + tuple(InputRecord(each.name, None, None, None, each.revision) for each in work.inputs if each.kind == "hub"),
        settings=work.settings,
        tokenizer=TokenizerRecord(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_token_id),
        dtype=dtype.__name__,
        train=merged.train,
        validation=merged.validation,
        counts=merged.counts,
        baselines=None,
        versions=_versions(),
        command=shlex.join(sys.argv),
        others=tuple(
            FileRecord(str(path.relative_to(partial)), path.stat().st_size, hash_file(path))
            for path in (*sorted((partial / "tokenizer").iterdir()), partial / REJECTS)
        ),
    )
    try:
        manifest.check_fits(config)
    except UserError:
        if merged.train.text_bytes + merged.validation.text_bytes < SOON_MADE_AGAIN:
            work.remove()
        raise
    if data.ngram_baselines:
        prefixes = [str(partial / name) for name in SPLITS]
        manifest = replace(manifest, baselines=baselines(prefixes[0], prefixes[1], tokenizer.vocab_size))
    (partial / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def _versions() -> dict[str, Any]:
    packages = ("moh-megatron", "numpy", "sentencepiece", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
