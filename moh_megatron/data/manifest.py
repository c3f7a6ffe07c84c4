"""manifest.json: what a prepared dataset was made of, with which settings, and what it holds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")
AGAIN = "Run pipelines/prepare_data.py CONFIG again."


@dataclass(frozen=True)
class FileRecord:
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitRecord:
    documents: int
    tokens: int
    """End-of-document tokens included."""
    text_bytes: int
    files: tuple[FileRecord, ...]
    """.bin and .idx, by name."""


@dataclass(frozen=True)
class TokenizerRecord:
    sha256: str
    entries: int
    end_of_document: int


@dataclass(frozen=True)
class Manifest:
    format: int
    inputs: tuple[FileRecord, ...]
    settings: dict[str, Any]
    """What besides the inputs decides the tokens: two runs with the same inputs and settings give the same dataset."""
    tokenizer: TokenizerRecord
    dtype: str
    train: SplitRecord
    validation: SplitRecord
    baselines: dict[str, float] | None
    versions: dict[str, str]
    command: str

    def split(self, name: str) -> SplitRecord:
        return {"train": self.train, "validation": self.validation}[name]

    def check_fits(self, config: Config) -> None:
        """Raise UserError where this dataset cannot feed the configured model."""
        if self.tokenizer.entries > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size must be at least {self.tokenizer.entries}, the entries of the tokenizer. "
                f"Got {config.model.vocab_size}."
            )
        documents = self.train.documents + self.validation.documents
        for name, remedy in (("train", "Lower"), ("validation", "Raise")):
            if not self.split(name).documents:
                raise UserError(
                    f"No document fell to the {name} split: the text has {documents} and data.validation_fraction is "
                    f"{self.settings['validation_fraction']}. {remedy} data.validation_fraction, choose a smaller "
                    "data.text_unit, or give more text."
                )
        least = config.train.sequence_length + 1
        for name in SPLITS:
            if self.split(name).tokens < least:
                remedy = "raise data.validation_fraction, " if name == "validation" else ""
                raise UserError(
                    f"The {name} text has {self.split(name).tokens} tokens, fewer than one sequence: at least {least} "
                    f"(train.sequence_length + 1) are needed. Give more text, {remedy}or lower train.sequence_length."
                )

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens ({split.text_bytes / 1e6:.2f} MB of text)"
            for name in SPLITS
            for split in [self.split(name)]
        ]
        lines.append(f"tokenizer: {self.tokenizer.entries:,} entries, sha256 {self.tokenizer.sha256[:12]}")
        if self.baselines is not None:
            nats = ", ".join(f"{name} {value:.4f}" for name, value in self.baselines.items())
            lines.append(f"nats a validation token by counting: {nats}")
        return "\n".join(lines)

    def to_json(self) -> bytes:
        return TypeAdapter(Manifest).dump_json(self, indent=2) + b"\n"


def record_file(path: Path, name: str) -> FileRecord:
    """Size and sha256 of a file, under the given name."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=name, bytes=path.stat().st_size, sha256=digest)


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared dataset, after a look at the presence and size of its files.

    Raises UserError where there is none or something of it is missing.
    """
    file = folder / MANIFEST
    try:
        manifest = TypeAdapter(Manifest).validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"No prepared data at {folder}. Run pipelines/prepare_data.py CONFIG first.") from None
    except ValidationError as error:
        raise UserError(f"{file}: not a manifest ({error.errors()[0]['msg']}). {AGAIN}") from None
    if manifest.format != FORMAT:
        raise UserError(f"{file}: expected format {FORMAT}. Got {manifest.format}. {AGAIN}")
    for name in SPLITS:
        for record in manifest.split(name).files:
            path = folder / record.path
            size = os.path.getsize(path) if path.is_file() else None
            if size != record.bytes:
                came = "the file is missing" if size is None else f"it has {size}"
                raise UserError(f"{path}: expected {record.bytes} bytes, but {came}. {AGAIN}")
    return manifest


def load_dataset_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer the dataset was made with. Raises UserError where its file has changed since."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.sha256 != manifest.tokenizer.sha256 or tokenizer.eod != manifest.tokenizer.end_of_document:
        raise UserError(f"{folder / 'tokenizer'}: not the tokenizer this dataset was made with. {AGAIN}")
    return tokenizer
