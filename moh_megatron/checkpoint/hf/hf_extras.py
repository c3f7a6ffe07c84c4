"""What a Hugging Face folder says beside its weights and its tokenizer, carried through checkpoints to an export.

    token_ids.json            config.json's ids of the tokens that begin and end a text, and fill up a batch
    generation_config.json    as it came

They lie with the tokenizer's files, and in their place where a model came without a tokenizer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moh_megatron.checkpoint.hf.hf_config_reader import HFSettings, check_token_ids
from moh_megatron.checkpoint.hf.hf_reader import CONFIG
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.json_file import read_json

TOKEN_IDS, GENERATION = "token_ids.json", "generation_config.json"
GENERATION_SETTINGS = "the settings of generation"


class Ends(NamedTuple):
    """Ids of the tokens that begin and end a text, and fill up a batch; all None where nothing says them."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Ends:
        """A document starts behind the token that ended the one before it."""
        # Transformers never trains the embedding of the padding token, so the end token must not be it.
        end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
        return cls(end, end, None if padding == end else padding)


@dataclass(frozen=True)
class Companions:
    """The files that a checkpoint keeps in its folder ``tokenizer``."""

    tokenizer: Tokenizer | None
    files: Mapping[str, bytes]
    """Beside the tokenizer's, by name; see ``carried_by``."""

    def save(self, folder: Path) -> None:
        """Write them into ``folder``, which is made where there is something to write."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)
        for name, content in self.files.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def carried_by(folder: Path) -> dict[str, bytes]:
    """The files, by name, of a Hugging Face folder, or of a checkpoint's folder ``tokenizer``.

    Raises:
        UserError: one is broken, or an id is no token.
    """
    found: dict[str, bytes] = {}
    if os.path.lexists(folder / GENERATION):
        read_json(folder / GENERATION, GENERATION_SETTINGS)
        found[GENERATION] = (folder / GENERATION).read_bytes()
    if (folder / CONFIG).is_file():
        # A Hugging Face folder: a file of others may bear our file's name.
        if stated := HFSettings(folder).token_ids():
            found[TOKEN_IDS] = (json.dumps(stated, indent=2) + "\n").encode("utf-8")
    elif os.path.lexists(folder / TOKEN_IDS):
        check_token_ids(folder / TOKEN_IDS, read_json(folder / TOKEN_IDS, "the ids of a model's tokens"), sys.maxsize)
        found[TOKEN_IDS] = (folder / TOKEN_IDS).read_bytes()
    return found


def stated_ends(files: Mapping[str, bytes]) -> Ends | None:
    """What ``carried_by`` found in config.json, or None."""
    if TOKEN_IDS not in files:
        return None
    ids = json.loads(files[TOKEN_IDS])
    return Ends(*(ids.get(f"{name}_token_id") for name in Ends._fields))
