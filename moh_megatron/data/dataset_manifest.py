"""Reads and writes manifest.json: what a prepared dataset was made of, with which settings, and what it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError
from moh_megatron.io.hashing import hash_file
from moh_megatron.io.small_file import read_small_file

MANIFEST = "manifest.json"
FORMAT = 2
SPLITS = ("train", "validation")
PREPARE_AGAIN = "Run moh-prepare CONFIG again."


@dataclass(frozen=True)
class FileRecord:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class InputRecord:
    """A file that was read, or a hub dataset, of which only ``path`` and ``revision`` are known."""

    path: str
    """The path of a file, or the name of a hub dataset."""
    bytes: int | None
    sha256: str | None
    modified_ns: int | None
    """When the file was last modified; if it has not been since, it need not be hashed again."""
    revision: str | None = None
    """The commit of a hub dataset, if the hub answered."""


@dataclass(frozen=True)
class Counts:
    """How many records the inputs have, and what became of them."""

    records: int
    rejects: int
    """Records that are listed in rejects.jsonl."""
    too_short: int
    too_long: int
    duplicates: int
    empty: int
    """Documents without a token, which are kept as empty entries."""
    in_pieces: int
    """Documents above data.max_document_bytes, which were encoded in several chunks."""


@dataclass(frozen=True)
class SplitRecord:
    """What one split holds."""

    documents: int
    tokens: int
    """Tokens, including those that end documents."""
    text_bytes: int
    files: tuple[FileRecord, ...]
    """The .bin and the .idx."""


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer a dataset was made with."""

    sha256: str
    entries: int
    eos_token_id: Annotated[int, Field(alias="end_of_document")]
    """In manifest.json the key is ``end_of_document``, as in existing datasets."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    format: int
    inputs: tuple[InputRecord, ...]
    settings: dict[str, Any]
    """What determines the dataset besides the inputs: the same inputs and settings give the same dataset."""
    tokenizer: TokenizerRecord
    dtype: str
    train: SplitRecord
    validation: SplitRecord
    counts: Counts
    baselines: dict[str, float] | None
    versions: dict[str, str]
    command: str
    others: tuple[FileRecord, ...] = ()
    """The files of tokenizer/, and rejects.jsonl; older manifests have none."""

    def split(self, name: str) -> SplitRecord:
        """The record of the split ``name``, one of SPLITS."""
        return {"train": self.train, "validation": self.validation}[name]

    def check_fits(self, config: Config) -> None:
        """Raise UserError if this dataset does not fit the configured model."""
        if self.tokenizer.entries > config.model.tokens:
            raise UserError(
                f"model.vocab_size must be at least {self.tokenizer.entries}, the entries of the tokenizer. "
                f"Got {config.model.vocab_size}."
            )
        check_sizes(
            {name: self.split(name).documents for name in SPLITS},
            {name: self.split(name).tokens for name in SPLITS},
            self.settings["validation_fraction"],
            config.train.sequence_length,
        )

    def summary(self) -> str:
        """A few lines of text about the dataset."""
        lines = [
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens ({split.text_bytes / 1e6:.2f} MB of text)"
            for name in SPLITS
            for split in [self.split(name)]
        ]
        removed = {
            "rejected (rejects.jsonl)": self.counts.rejects,
            "too short": self.counts.too_short,
            "too long": self.counts.too_long,
            "duplicates": self.counts.duplicates,
        }
        if any(removed.values()):
            lines.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in removed.items() if count))
        lines.append(f"tokenizer: {self.tokenizer.entries:,} entries, sha256 {self.tokenizer.sha256[:12]}")
        if self.baselines is not None:
            names = {"unigram_entropy": "single tokens", "bigram_entropy": "pairs of tokens"}
            nats = ", ".join(f"{names.get(name, name)} {value:.4f}" for name, value in self.baselines.items())
            lines.append(f"nats a validation token by counts: {nats}")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        return TypeAdapter(Manifest).dump_json(self, indent=2, by_alias=True) + b"\n"


def check_sizes(
    documents: Mapping[str, int],
    tokens: Mapping[str, int],
    validation_fraction: float,
    sequence_length: int,
    at_most: bool = False,
) -> None:
    """Raise UserError where a split that is needed has no document, or fewer tokens than a sequence.

    With ``at_most`` the numbers of ``tokens`` are upper bounds.
    """
    needed = {"train": "Lower", "validation": "Raise"} if validation_fraction else {"train": "Lower"}
    for name, remedy in needed.items():
        if not documents[name]:
            raise UserError(
                f"No document was assigned to the {name} split: the text has {sum(documents.values())} and "
                f"data.validation_fraction is {validation_fraction}. {remedy} "
                "data.validation_fraction, choose a smaller data.text_unit, or give more text."
            )
    least = sequence_length + 1
    for name in needed:
        if tokens[name] < least:
            remedy = "raise data.validation_fraction, " if name == "validation" else ""
            raise UserError(
                f"The {name} text has {'at most ' if at_most else ''}{tokens[name]} tokens, fewer than one sequence: "
                f"at least {least} (train.sequence_length + 1) are needed. Give more text, {remedy}or lower "
                "train.sequence_length."
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        return hash_file(path).sha256
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the disk and the permissions.") from None


def load_manifest(folder: Path) -> Manifest:
    """Load the manifest of a prepared dataset, and check that its files exist with the recorded sizes.

    Raises UserError if there is no manifest, or if a file is missing or has another size.
    """
    file = folder / MANIFEST
    try:
        manifest = TypeAdapter(Manifest).validate_json(read_small_file(file))
    except FileNotFoundError:
        raise UserError(f"No prepared data at {folder}. Run moh-prepare CONFIG first.") from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}. {PREPARE_AGAIN}") from None
    except ValidationError as error:
        raise UserError(f"{file}: not a manifest ({error.errors()[0]['msg']}). {PREPARE_AGAIN}") from None
    if manifest.format != FORMAT:
        raise UserError(f"{file}: expected format {FORMAT}. Got {manifest.format}. {PREPARE_AGAIN}")
    for name in SPLITS:
        for record in manifest.split(name).files:
            path = folder / record.path
            size = os.path.getsize(path) if path.is_file() else None
            if size != record.bytes:
                finding = "the file is missing" if size is None else f"it has {size}"
                raise UserError(f"{path}: expected {record.bytes} bytes, but {finding}. {PREPARE_AGAIN}")
    return manifest


def load_dataset_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Load the tokenizer the dataset was made with. Raises UserError if its file has changed since."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.sha256 != manifest.tokenizer.sha256 or tokenizer.eos_token_id != manifest.tokenizer.eos_token_id:
        raise UserError(f"{folder / 'tokenizer'}: not the tokenizer this dataset was made with. {PREPARE_AGAIN}")
    return tokenizer
