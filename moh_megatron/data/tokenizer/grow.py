"""More pieces for a BPE that is there: every old id stays, and every text is still cut by the old merges first.

Training goes on where it ended: the old tokens of a text are the characters of a new BPE, which the tokenizers library
trains, and its merges are appended. So each new piece is reached from the old ones.
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

from moh_megatron.data.tokenizer.tokenizer import FILES, SENTENCEPIECE, TOKENIZER_JSON, Tokenizer
from moh_megatron.io.errors import UserError

_FIRST = 0x10000
"""Old ids become characters from here on: no surrogates follow, nor anything a text is cut at."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def grow_tokenizer(base: Tokenizer, texts: Iterable[str], *, entries: int, out_dir: Path) -> None:
    """Write into ``out_dir`` the files of ``base`` with pieces learned on ``texts``, ``entries`` in all.

    Raises UserError where ``base`` is no BPE, has as many entries, or the texts cannot give so many.
    """
    settings: dict[str, Any] = json.loads(base.to_json())
    model = settings["model"]
    if model["type"] != "BPE":
        raise UserError(f"tokenizer.path: only a BPE can grow. Got {model['type']}; set tokenizer.grow_to to null.")
    if entries <= base.vocab_size:
        raise UserError(
            f"tokenizer.grow_to must be above the {base.vocab_size} entries of tokenizer.path. Got {entries}."
        )
    # An added token that is not in the model's vocabulary gets the next free id when it is loaded: pin it there.
    model["vocab"] |= {each["content"]: each["id"] for each in settings["added_tokens"]}
    special = {each["id"] for each in settings["added_tokens"]}
    names = {number: name for name, number in model["vocab"].items() if number not in special}
    merges = {tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]}
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    number = base.vocab_size
    for pair in _learned(base, names, texts, entries):
        left, right = ("".join(names[ord(character) - _FIRST] for character in side) for side in pair)
        if number == entries:
            break
        if (left, right) in merges:
            continue
        merges.add((left, right))
        model["merges"].append(f"{left} {right}" if as_text else [left, right])
        if left + right not in model["vocab"]:
            model["vocab"][left + right] = number
            number += 1
    if number < entries:
        raise UserError(
            f"tokenizer.grow_to is {entries}, more than the text of data.inputs can fill: at most {number}. Lower it, "
            "give more text, or raise tokenizer.sample_bytes."
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in set(FILES) - {TOKENIZER_JSON, SENTENCEPIECE}:
        if (base.folder / name).is_file():
            (out_dir / name).write_bytes((base.folder / name).read_bytes())
    content = json.dumps(settings, ensure_ascii=False, indent=2)
    (out_dir / TOKENIZER_JSON).write_text(content + "\n", encoding="utf-8")


def _learned(base: Tokenizer, names: dict[int, str], texts: Iterable[str], entries: int) -> list[tuple[str, str]]:
    """New merges, best first, of strings of old tokens, each as a character."""
    learner: Any = Encoder(BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer: Any = BpeTrainer(vocab_size=2 * entries, min_frequency=2, show_progress=False)  # pyright: ignore[reportCallIssue]
    learner.train_from_iterator(_words(base, names, texts), trainer)
    merges: list[Any] = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in (m.split(" ") if isinstance(m, str) else m for m in merges)]


def _words(base: Tokenizer, names: dict[int, str], texts: Iterable[str]) -> Iterator[str]:
    """Old tokens as characters, with a space wherever no piece may reach across."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            before: int | None = None
            characters = []
            for token, word in base.encode_words(line):
                name = names.get(token)
                if name is None or _BYTE.fullmatch(name):
                    characters.append(" ")
                    continue
                if word != before or name.startswith("\u2581"):
                    characters.append(" ")
                characters.append(chr(_FIRST + token))
                before = word
            yield "".join(characters)
