"""Adds pieces to an existing BPE: every old id stays, and the old merges are still applied first.

Training continues where it ended: the old tokens of a text become the characters of a new BPE, which the tokenizers
library trains, and its merges are appended. So each new piece is merged from old ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from moh_megatron.data.tokenizer.names import SENTENCEPIECE_MODEL, SPACE, TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import UserError

_FIRST_CHARACTER = 0x10000
"""The character that stands for id 0. Neither surrogates nor white space follow it."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def grow_tokenizer(base: Tokenizer, texts: Iterable[str], *, entries: int, out_dir: Path) -> None:
    """Write into ``out_dir`` the files of ``base`` with pieces learned on ``texts``, ``entries`` in total.

    Raises UserError if ``base`` is no BPE or has that many entries already, or if the texts cannot give so many.
    """
    settings: dict[str, Any] = json.loads(base.to_json())
    model = settings["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer.path: only a BPE can grow. Got {model['type']}; set tokenizer.grow_to to null.")
    if entries <= base.vocab_size:
        raise UserError(
            f"tokenizer.grow_to must be above the {base.vocab_size} entries of tokenizer.path. Got {entries}."
        )
    # An added token that the model's vocabulary lacks would get the next free id on loading: write its id down.
    model["vocab"] |= {token["content"]: token["id"] for token in settings["added_tokens"]}
    merges = {tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    # No merge may give the name of an added token, of the unknown token or of a byte, nor go on from one left out.
    reserved = {token["content"] for token in settings["added_tokens"]} | {model.get("unk_token")}
    reserved |= {name for name in model["vocab"] if model.get("byte_fallback") and _BYTE_PIECE.fullmatch(name)}
    names = {token_id: name for name, token_id in model["vocab"].items() if name not in reserved}
    next_id = base.vocab_size
    for pair in _learned_merges(base, names, texts, entries):
        left, right = ("".join(names[ord(character) - _FIRST_CHARACTER] for character in side) for side in pair)
        if next_id == entries:
            break
        if (
            (left, right) in merges
            or {left, right, left + right} & reserved
            or not {left, right} <= model["vocab"].keys()
        ):
            continue
        merges.add((left, right))
        model["merges"].append(f"{left} {right}" if as_text else [left, right])
        if left + right not in model["vocab"]:
            model["vocab"][left + right] = next_id
            next_id += 1
    if next_id < entries:
        raise UserError(
            f"tokenizer.grow_to is {entries}, more than the text of data.inputs can fill: at most {next_id}. Lower it, "
            "give more text, or raise tokenizer.sample_bytes."
        )
    base.save(out_dir)  # with its settings, such as split_special_tokens, which a .model has without a file
    (out_dir / SENTENCEPIECE_MODEL).unlink(missing_ok=True)
    content = json.dumps(settings, ensure_ascii=False, indent=2)
    (out_dir / TOKENIZER_JSON).write_text(content + "\n", encoding="utf-8")


def _learned_merges(
    base: Tokenizer, names: dict[int, str], texts: Iterable[str], entries: int
) -> list[tuple[str, str]]:
    """New merges, best first; both sides are strings in which each character stands for an old token."""
    learner: Any = Encoder(BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer: Any = BpeTrainer(vocab_size=2 * entries, min_frequency=2, show_progress=False)  # pyright: ignore[reportCallIssue]
    learner.train_from_iterator(_words(base, names, texts), trainer)
    merges: list[Any] = json.loads(learner.to_str())["model"]["merges"]
    return [
        (left, right) for left, right in (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    ]


def _words(base: Tokenizer, names: dict[int, str], texts: Iterable[str]) -> Iterator[str]:
    """Each line of the texts, its old tokens written as characters; no piece may extend across a space."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            previous_word: int | None = None
            characters = []
            for token, word in base.encode_words(line):
                name = names.get(token)
                if name is None or _BYTE_PIECE.fullmatch(name):
                    characters.append(" ")
                    continue
                if word != previous_word or name.startswith(SPACE):
                    characters.append(" ")
                characters.append(chr(_FIRST_CHARACTER + token))
                previous_word = word
            yield "".join(characters)
