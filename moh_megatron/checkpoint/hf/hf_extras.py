"""Carries what a Hugging Face folder holds beside weights and tokenizer through checkpoints to an export.

    token_ids.json            the ids in config.json of the tokens that begin a text, end a text and pad a batch
    generation_config.json    unchanged

A checkpoint keeps them in its folder ``tokenizer``, also where the model has no tokenizer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader, check_token_ids
from moh_megatron.checkpoint.hf.hf_folder import CONFIG
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.json_file import read_json
from moh_megatron.io.small_file import read_small_file

TOKEN_IDS, GENERATION = "token_ids.json", "generation_config.json"
GENERATION_SETTINGS = "the settings of generation"


class SpecialTokenIds(NamedTuple):
    """Ids of the tokens that begin a text, end a text and pad a batch; None where an id is not stated."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> SpecialTokenIds:
        """The end token also begins a text: it separates the documents of the training data."""
        # Transformers does not train the embedding of the padding token, so the end token must not be it.
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(eos, eos, None if pad == eos else pad)


@dataclass(frozen=True)
class HFExtras:
    """The files that a checkpoint keeps in its folder ``tokenizer``: the tokenizer's own, and those listed above."""

    tokenizer: Tokenizer | None
    files: Mapping[str, bytes]
    """Content by file name, as ``read_extras`` returns it."""

    def save(self, folder: Path) -> None:
        """Write the files into ``folder``; it is created only if there is something to write."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        for name, content in self.files.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def read_extras(folder: Path) -> dict[str, bytes]:
    """Read the files listed above from a Hugging Face folder, or from a checkpoint's folder ``tokenizer``.

    Raises:
        UserError: a file is broken, or an id is no token.
    """
    found: dict[str, bytes] = {}
    if os.path.lexists(folder / GENERATION):
        read_json(folder / GENERATION, GENERATION_SETTINGS)
        found[GENERATION] = read_small_file(folder / GENERATION)
    if (folder / CONFIG).is_file():
        # This is a Hugging Face folder, where token_ids.json would be somebody else's file.
        if token_ids := HFConfigReader(folder).token_ids():
            found[TOKEN_IDS] = (json.dumps(token_ids, indent=2) + "\n").encode("utf-8")
    elif os.path.lexists(folder / TOKEN_IDS):
        check_token_ids(folder / TOKEN_IDS, read_json(folder / TOKEN_IDS, "the ids of a model's tokens"), sys.maxsize)
        found[TOKEN_IDS] = read_small_file(folder / TOKEN_IDS)
    return found


def special_token_ids(files: Mapping[str, bytes]) -> SpecialTokenIds | None:
    """Return the ids that ``read_extras`` found in config.json, or None."""
    if TOKEN_IDS not in files:
        return None
    ids = json.loads(files[TOKEN_IDS])
    return SpecialTokenIds(*(ids.get(f"{name}_token_id") for name in SpecialTokenIds._fields))
