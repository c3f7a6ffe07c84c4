"""The one tokenizer loader: a tokenizer.json, a SentencePiece .model or a folder, by the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Encoder

from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json_if_any

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODEL = ".model"
SENTENCEPIECE = "tokenizer.model"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE, SENTENCEPIECE)
SPACE = "\u2581"
"""SentencePiece's sign for a space. A text's own U+2581 is decoded as a space, there as here: the one loss."""
WORD = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
END_OF_DOCUMENT = ("</s>", "<|endoftext|>", "<|end_of_text|>")


class Tokenizer:
    """Text <-> token ids. Nothing is added to a text.

    It is also what ``megatron.core.datasets`` asks of a tokenizer: ``vocab_size``, ``eod``, ``pad``,
    ``unique_identifiers``.
    """

    def __init__(self, encoder: Encoder, file: Path, content: str, eod: int, pad: int) -> None:
        self.file = file
        """What it was loaded from."""
        self.sha256 = hashlib.sha256(content.encode("utf-8")).hexdigest()
        """Of tokenizer.json, which a .model is turned into."""
        self.eod = eod
        """Id of the token that ends a document."""
        self.pad = pad
        """Id of the padding token; ``eod`` where there is none. Prepared data holds no padding."""
        self._encoder = encoder
        self._content = content

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.file.parent

    @cached_property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id + 1."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def split_special_tokens(self) -> bool:
        """Whether the name of a special token in a text is ordinary characters."""
        return self._encoder.encode_special_tokens

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[list[int]]:
        """As ``encode`` for each text, on all cores. One that is ``continued`` begins inside a document: the space that
        some tokenizers put before every text is not put there."""
        if not any(continued) or not self._adds_space:
            return _ids(self._encoder, texts)
        ids: dict[bool, Iterator[list[int]]] = {}
        for inside, encoder in ((False, self._encoder), (True, self._inside)):
            chosen = [text for text, each in zip(texts, continued, strict=True) if each == inside]
            ids[inside] = iter(_ids(encoder, chosen))
        return [next(ids[inside]) for inside in continued]

    @cached_property
    def _adds_space(self) -> bool:
        return self._inside.to_str() != self._encoder.to_str()

    @cached_property
    def _inside(self) -> Encoder:
        """The same encoder without a space before the text."""
        encoder = Encoder.from_str(json.dumps(_without_prefix(json.loads(self._encoder.to_str()))))
        return _configured(encoder, self.split_special_tokens)

    def encode_words(self, text: str) -> list[tuple[int, int | None]]:
        """The tokens, each with the number of the word it is in; the tokenizer cuts a text into words first."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.word_ids, strict=True))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens give none."""
        return self._encoder.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """Its tokenizer.json."""
        return self._content

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder``, which is made where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        (folder / TOKENIZER_JSON).write_bytes(self._content.encode("utf-8"))
        if self.file.suffix == MODEL:
            shutil.copyfile(self.file, folder / SENTENCEPIECE)
        settings = _settings(folder / TOKENIZER_CONFIG)
        if not settings or self.split_special_tokens != settings.get("split_special_tokens", False):
            made = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._encoder.id_to_token(self.eod)}
            settings = {**made, **settings, "split_special_tokens": self.split_special_tokens}
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that ``load_tokenizer`` reads."""
    return any((folder / name).is_file() for name in (TOKENIZER_JSON, SENTENCEPIECE))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, a SentencePiece .model, or the one in a folder, where tokenizer.json goes first.

    The token that ends a document is tokenizer_config.json's ``eos_token``, else the .model's, else the first of </s>,
    <|endoftext|> and <|end_of_text|> the vocabulary has. The name of a special token in a text is that token, as in
    transformers and Megatron-LM; ordinary characters where tokenizer_config.json sets ``split_special_tokens``, as that
    of a tokenizer made here does, and with a .model, as in SentencePiece.

    Raises UserError for a missing or broken file, a .model that cannot be turned into a tokenizer.json with the same
    results, and where no token can end a document.
    """
    file = _find(Path(path).expanduser())
    end = None
    if file.suffix == MODEL:
        from moh_megatron.data.tokenizer.sentencepiece_json import from_model

        try:
            twin, end = from_model(file.read_bytes())
        except ValueError as error:
            raise UserError(
                f"{file}: no tokenizer.json gives the same results ({error}). Name a tokenizer.json."
            ) from None
        content = twin.to_str()
    else:
        content = file.read_bytes().decode("utf-8", errors="replace")
    try:
        encoder = Encoder.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a {TOKENIZER_JSON} the tokenizers library reads ({error}).") from None
    settings = _settings(file.parent / TOKENIZER_CONFIG)
    _configured(encoder, bool(settings.get("split_special_tokens", file.suffix == MODEL)))
    if encoder.pre_tokenizer is None and _words_are_apart(json.loads(content)["model"]):
        encoder.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    eod = _token_id(encoder, settings, "eos_token", file)
    if eod is None:
        known = (encoder.token_to_id(name) for name in (end, *END_OF_DOCUMENT) if name is not None)
        eod = next((token for token in known if token is not None), None)
    if eod is None:
        raise UserError(
            f"{file}: no token that ends a document. Expected eos_token in {TOKENIZER_CONFIG} beside it, "
            f"or one of {', '.join(END_OF_DOCUMENT)} in the vocabulary."
        )
    pad = _token_id(encoder, settings, "pad_token", file)
    return Tokenizer(encoder, file, content, eod, eod if pad is None else pad)


def _find(path: Path) -> Path:
    for file in (path / TOKENIZER_JSON, path / SENTENCEPIECE) if path.is_dir() else (path,):
        if file.is_file():
            return file
    raise UserError(f"No tokenizer at {path}: expected a {TOKENIZER_JSON}, a .model, or a folder that holds one.")


def _ids(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def _words_are_apart(model: dict[str, Any]) -> bool:
    """Whether cutting a text into WORDs changes no token: where no piece has a space behind another character.

    A BPE that cuts nothing itself, as LLaMA-2's, takes a whole document for one word: slow, and large in memory.
    """
    return (
        model["type"] == "BPE"
        and SPACE in model["vocab"]
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and not any(SPACE in piece.lstrip(SPACE) for piece in model["vocab"])
    )


def _configured(encoder: Encoder, split_special_tokens: bool) -> Encoder:
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = split_special_tokens
    return encoder


def _without_prefix(part: Any) -> Any:
    """A tokenizer.json, or a part of one, that puts nothing before a text."""
    if isinstance(part, list):
        return [
            _without_prefix(each) for each in part if not (isinstance(each, dict) and each.get("type") == "Prepend")
        ]
    if not isinstance(part, dict):
        return part
    changed = {key: value if key == "model" else _without_prefix(value) for key, value in part.items()}
    if changed.get("type") == "Prepend":
        return None
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if changed.get("type") == "Strip" and "strip_left" in changed:
        changed["strip_left"] = False
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _settings(file: Path) -> dict[str, Any]:
    return read_json_if_any(file, "the settings of a tokenizer")


def _token_id(encoder: Encoder, settings: dict[str, Any], key: str, file: Path) -> int | None:
    token = settings.get(key)
    if token is None:
        return None
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        place = file.with_name(TOKENIZER_CONFIG)
        raise UserError(f"{place}: {key} must be a token, or an object whose content is one. Got {token!r}.")
    number = encoder.token_to_id(name)
    if number is None:
        raise UserError(f"{file}: {key} of {TOKENIZER_CONFIG} is {name!r}, which the vocabulary does not have.")
    return number
