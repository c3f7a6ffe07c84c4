"""Prepares a dataset from raw text: tokenizer, Megatron's .bin and .idx of two splits, and a manifest.

The parts are made in the folder ``<data.dir>.parts`` beside it, where a restarted run or another shard finds what is
finished. The last step merges them, and the dataset's folder appears complete or not at all.
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
    file_sha256,
    load_manifest,
)
from moh_megatron.data.prepare.enough_text import check_enough_text
from moh_megatron.data.prepare.indexed_writer import token_dtype
from moh_megatron.data.prepare.inputs import find_inputs
from moh_megatron.data.prepare.make_tokenizer import given_tokenizer, train_on_inputs
from moh_megatron.data.prepare.merge import merge_parts, write_rejects
from moh_megatron.data.prepare.ngrams import baselines
from moh_megatron.data.prepare.working_folder import REJECTS, PrepareJob
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.io.remedies import write_fault

logger = logging.getLogger(__name__)

ALREADY = "already prepared from the same text with the same settings"
QUICKLY_REDONE = 100_000_000
"""Bytes of text below which parts are not kept for another attempt if the dataset does not fit the model."""


def prepare(config: Config) -> Manifest:
    """Make the dataset of ``config.data`` in its folder, unless it is there already.

    The folder then holds train.bin, train.idx, validation.bin, validation.idx, rejects.jsonl, tokenizer/ and
    manifest.json. It appears complete or not at all, and an earlier dataset is replaced only when the new one is
    complete. Parts that shards have finished are used, the others are made first.

    Raises UserError for input, settings and sizes that the user can change, Fault if the disk fails.
    """
    folder = data_dir(config)
    given = given_tokenizer(config)
    job = PrepareJob(config, find_inputs(config.data.inputs), given)
    if (ready := _existing(folder, job)) is not None:
        _check_rejects(folder, ready, config.data.max_reject_fraction)
        ready.check_fits(config)
        logger.info(f"{folder}: {ALREADY}")
        return ready
    with _disk_faults(folder), job:
        check_enough_text(config, job.inputs, job.plan, given)
        tokenizer = job.tokenizer()
        if given is None:
            check_enough_text(config, job.inputs, job.plan, tokenizer)
        job.make_parts(tokenizer, 1, 1)
        with atomic_folder(folder, "data.dir") as partial:
            manifest = _merge(config, job, tokenizer, partial)
        job.remove()
    return manifest


def prepare_shard(config: Config, shard: int, shards: int) -> None:
    """Make the parts of ``shard`` (from 1) of ``shards``, which ``prepare`` then merges. Raises as ``prepare`` does.

    Does nothing if the dataset is there already.
    """
    folder = data_dir(config)
    given = shard_tokenizer(config)
    job = PrepareJob(config, find_inputs(config.data.inputs), given)
    if _existing(folder, job) is not None:
        logger.info(f"{folder}: {ALREADY}")
        return
    with _disk_faults(folder), job:
        job.make_parts(given, shard, shards)


def shard_tokenizer(config: Config) -> Tokenizer:
    """The given tokenizer. Raises UserError if none is given, since every shard would train its own."""
    given = given_tokenizer(config)
    if given is None:
        raise UserError(
            "data.shard needs an existing tokenizer. Make it first, with moh-prepare CONFIG "
            "--tokenizer DIR, and set tokenizer.path=DIR."
        )
    return given


@contextmanager
def _disk_faults(folder: Path, setting: str | None = "data.dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_fault(folder, error, setting) from error


def prepare_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """Make the tokenizer of data.inputs, or of all sources, in the new ``folder``.

    tokenizer.path is used only with tokenizer.grow_to. Raises UserError.
    """
    if folder.exists():
        raise UserError(f"--tokenizer: {folder} exists already. Name a new folder.")
    if config.tokenizer.grow_to is None:
        config = replace(config, tokenizer=replace(config.tokenizer, path=None))
    with _disk_faults(folder, None):
        train_on_inputs(config, folder, None)
    return load_tokenizer(folder)


def _existing(folder: Path, job: PrepareJob) -> Manifest | None:
    """The manifest of the dataset in ``folder`` if it is complete and the one that ``job`` would make; else None."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UserError(f"data.dir: {folder} exists and is not a prepared dataset. Name another folder, or remove it.")
    try:
        manifest = load_manifest(folder)
    except UserError:
        return None
    return manifest if manifest.settings == job.settings and job.same_inputs(manifest.inputs) else None


def _check_rejects(folder: Path, ready: Manifest, limit: float) -> None:
    """Raise UserError if an existing dataset was made with a larger share of rejects than is allowed now."""
    counts = ready.counts
    if counts.rejects > limit * counts.records:
        raise UserError(
            f"{folder}: {counts.rejects:,} of {counts.records:,} records were rejected when it was made, more than "
            f"data.max_reject_fraction ({limit:g}); {folder / REJECTS} lists them. Mend the input, or raise "
            "data.max_reject_fraction."
        )


def _merge(config: Config, job: PrepareJob, tokenizer: Tokenizer, partial: Path) -> Manifest:
    """Fill the folder ``partial``. Raises UserError for too many rejects, and if the dataset does not fit the model."""
    data = config.data
    job.check_rejects()
    dtype = token_dtype(tokenizer.vocab_size)
    with progress_bar("merge", len(job.parts), "part") as bar:
        merged = merge_parts(
            job.parts,
            partial,
            dtype,
            validation_fraction=data.validation_fraction,
            deduplicate=data.deduplicate,
            advance=bar.update,
        )
    write_rejects(partial / REJECTS, job.rejects())
    tokenizer.save(partial / "tokenizer")
    manifest = Manifest(
        format=FORMAT,
        inputs=tuple(
            InputRecord(file.path, file.bytes, job.sha256(file), file.modified_ns)
            for source in job.inputs
            for file in source.files
        )
        + tuple(
            InputRecord(source.name, None, None, None, source.revision) for source in job.inputs if source.kind == "hub"
        ),
        settings=job.settings,
        tokenizer=TokenizerRecord(tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_token_id),
        dtype=dtype.__name__,
        train=merged.train,
        validation=merged.validation,
        counts=merged.counts,
        baselines=None,
        versions=_versions(),
        command=shlex.join(sys.argv),
        others=tuple(
            FileRecord(str(path.relative_to(partial)), path.stat().st_size, file_sha256(path))
            for path in (*sorted((partial / "tokenizer").iterdir()), partial / REJECTS)
        ),
    )
    try:
        manifest.check_fits(config)
    except UserError:
        if merged.train.text_bytes + merged.validation.text_bytes < QUICKLY_REDONE:
            job.remove()
        raise
    if data.ngram_baselines:
        prefixes = [str(partial / name) for name in SPLITS]
        manifest = replace(manifest, baselines=baselines(prefixes[0], prefixes[1], tokenizer.vocab_size))
    (partial / MANIFEST).write_bytes(manifest.to_json())
    return manifest


def _versions() -> dict[str, Any]:
    packages = ("moh-megatron", "numpy", "sentencepiece", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
