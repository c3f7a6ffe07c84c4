"""Loads a tokenizer from a tokenizer.json, a SentencePiece .model or a folder, with the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers, processors
from tokenizers import Tokenizer as Encoder

from moh_megatron.data.tokenizer.names import (
    EOS_TOKENS,
    LEADING_SPACES,
    SENTENCEPIECE_MODEL,
    SENTENCEPIECE_SUFFIX,
    SPACE,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    WORD,
)
from moh_megatron.data.tokenizer.panics import TokenizersPanic, panics_as_value_errors
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json_if_any
from moh_megatron.io.small_file import read_small_file

logger = logging.getLogger(__name__)


class Tokenizer:
    """Turns text into token ids and back. Nothing is added to a text.

    It has the interface that ``megatron.core.datasets`` expects of a tokenizer: ``vocab_size``, ``eod``, ``pad`` and
    ``unique_identifiers``.
    """

    def __init__(self, encoder: Encoder, file: Path, content: str, eos_token_id: int, pad_token_id: int) -> None:
        self.file = file
        """The file it was loaded from."""
        self.sha256 = hashlib.sha256(content.encode("utf-8")).hexdigest()
        """Hash of its tokenizer.json; a .model is turned into one first."""
        self.eos_token_id = eos_token_id
        """Id of the token that ends a document."""
        self.pad_token_id = pad_token_id
        """Id of the padding token; ``eos_token_id`` where there is none. Prepared data holds no padding."""
        self._encoder = encoder
        self._content = content

    @property
    def folder(self) -> Path:
        """The folder that holds its files."""
        return self.file.parent

    @cached_property
    def vocab_size(self) -> int:
        """The number of rows an embedding needs: the largest id + 1."""
        return max(self._encoder.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eod(self) -> int:
        """Megatron-core's name for ``eos_token_id``."""
        return self.eos_token_id

    @property
    def pad(self) -> int:
        """Megatron-core's name for ``pad_token_id``."""
        return self.pad_token_id

    @property
    def split_special_tokens(self) -> bool:
        """Whether the name of a special token in a text is encoded as ordinary characters."""
        return self._encoder.encode_special_tokens

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """What Megatron-core names its index caches after."""
        return OrderedDict({"class": type(self).__name__, "sha256": self.sha256})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The token ids of ``text``; ``add_special_tokens`` adds those that tokenizer.json puts around a text."""
        with self._errors_named():
            return self._encoder.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] = ()) -> list[list[int]]:
        """``encode`` for each text, on all cores.

        A text that is ``continued`` begins inside a document: the space that some tokenizers put before every text is
        left out there.
        """
        with self._errors_named():
            if not any(continued) or not self._adds_space:
                return _ids(self._encoder, texts)
            ids: dict[bool, Iterator[list[int]]] = {}
            for inside, encoder in ((False, self._encoder), (True, self._inside)):
                chosen = [text for text, is_inside in zip(texts, continued, strict=True) if is_inside == inside]
                ids[inside] = iter(_ids(encoder, chosen))
            return [next(ids[inside]) for inside in continued]

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Turn a panic of the library into a UserError that names the file."""
        try:
            with panics_as_value_errors():
                yield
        except TokenizersPanic as error:
            raise UserError(
                f"{self.file}: must encode every text. Got one that it cannot ({error}). Name another tokenizer."
            ) from error

    @cached_property
    def _adds_space(self) -> bool:
        return self._inside.to_str() != self._encoder.to_str()

    @cached_property
    def _inside(self) -> Encoder:
        """The same encoder, which puts no space before the text."""
        encoder = Encoder.from_str(json.dumps(_without_prefix(json.loads(self._encoder.to_str()))))
        return _configured(encoder, self.split_special_tokens)

    def encode_words(self, text: str) -> list[tuple[int, int | None]]:
        """(token id, index of its word) of each token; the tokenizer splits a text into words first."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.word_ids, strict=True))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return self._encoder.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        return self._content

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into ``folder``, which is created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        (folder / TOKENIZER_JSON).write_bytes(self._content.encode("utf-8"))
        if self.file.suffix == SENTENCEPIECE_SUFFIX:
            shutil.copyfile(self.file, folder / SENTENCEPIECE_MODEL)
        settings = _settings(folder / TOKENIZER_CONFIG)
        if not settings or self.split_special_tokens != settings.get("split_special_tokens", False):
            defaults = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": self._encoder.id_to_token(self.eos_token_id),
            }
            settings = {**defaults, **settings, "split_special_tokens": self.split_special_tokens}
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that ``load_tokenizer`` reads, or refuses because it is no regular file."""
    return any(_is_present(folder / name) for name in (TOKENIZER_JSON, SENTENCEPIECE_MODEL))


def _is_present(file: Path) -> bool:
    return os.path.lexists(file) and not file.is_dir()


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.json, a SentencePiece .model, or the one in a folder, where tokenizer.json takes precedence.

    The token that ends a document is the ``eos_token`` of tokenizer_config.json, else the .model's, else the first of
    </s>, <|endoftext|> and <|end_of_text|> that the vocabulary has. The name of a special token in a text is encoded as
    that token, as in transformers and Megatron-LM. It is encoded as ordinary characters where tokenizer_config.json
    sets ``split_special_tokens``, as our own tokenizers do, and with a .model, as in SentencePiece. Special tokens are
    put around a text as tokenizer.json says, for a .model as ``add_bos_token`` and ``add_eos_token`` say.

    Raises UserError for a missing or broken file, for a .model that no tokenizer.json reproduces, where no token can
    end a document, and where a text gives a special token in spite of ``split_special_tokens``.
    """
    file = _find(Path(path).expanduser())
    settings = _settings(file.parent / TOKENIZER_CONFIG)
    model_eos_token = None
    if file.suffix == SENTENCEPIECE_SUFFIX:
        content, model_eos_token = _converted(file, settings)
    else:
        content = read_small_file(file).decode("utf-8", errors="replace")
    try:
        with panics_as_value_errors():
            encoder = Encoder.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{file}: not a {TOKENIZER_JSON} the tokenizers library reads ({error}).") from None
    _configured(encoder, bool(settings.get("split_special_tokens", file.suffix == SENTENCEPIECE_SUFFIX)))
    if encoder.pre_tokenizer is None and _can_split_into_words(json.loads(content)["model"]):
        encoder.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")  # pyright: ignore[reportAttributeAccessIssue]
    eos_token_id = _token_id(encoder, settings, "eos_token", file)
    if eos_token_id is None:
        known = (encoder.token_to_id(name) for name in (model_eos_token, *EOS_TOKENS) if name is not None)
        eos_token_id = next((token for token in known if token is not None), None)
    if eos_token_id is None:
        raise UserError(
            f"{file}: no token that ends a document. Expected eos_token in {TOKENIZER_CONFIG} beside it, "
            f"or one of {', '.join(EOS_TOKENS)} in the vocabulary."
        )
    pad_token_id = _token_id(encoder, settings, "pad_token", file)
    pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
    tokenizer = Tokenizer(encoder, file, content, eos_token_id, pad_token_id)
    if tokenizer.split_special_tokens:
        _check_names_are_split(tokenizer, encoder)
    return tokenizer


def _converted(file: Path, settings: dict[str, Any]) -> tuple[str, str | None]:
    """The content of the tokenizer.json of a .model, and its end-of-sentence piece, if it has one."""
    # Only a .model needs the sentencepiece library.
    from moh_megatron.data.tokenizer.sentencepiece_json import NotEquivalentError, differing_marks, from_model

    content = read_small_file(file)
    try:
        converted, model = from_model(content)
    except ValueError as error:
        remedy = f" {error.remedy}" if isinstance(error, NotEquivalentError) and error.remedy else ""
        raise UserError(
            f"{file}: no tokenizer.json gives the same results ({error}). Name another tokenizer, or the "
            f"tokenizer.json that a model was trained with.{remedy}"
        ) from None
    if (difference := differing_marks(converted, model)) is not None:
        text, ids, expected = difference
        logger.warning(
            f"{file}: letters with combining marks are normalised in another way than SentencePiece does: {text!r} "
            f"gives {ids}, and {expected} there. Other texts have the same tokens; data.normalization: nfkc leaves "
            "few such letters."
        )
    around: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for name, default in (("bos", model.bos_id()), ("eos", model.eos_id())):
        stated = _token_id(converted, settings, f"{name}_token", file)
        token_id = default if f"{name}_token" not in settings else -1 if stated is None else stated
        if settings.get(f"add_{name}_token") is True and token_id >= 0:
            around[name].append((str(converted.id_to_token(token_id)), token_id))
    if any(around.values()):
        single, pair = ([*around["bos"], (text, 0), *around["eos"]] for text in ("$A", "$B"))
        converted.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[f"{token}:0" for token, _ in single],
            pair=[f"{token}:0" for token, _ in single] + [f"{token}:1" for token, _ in pair],
            special_tokens=[*around["bos"], *around["eos"]],
        )
    return converted.to_str(), model.id_to_piece(model.eos_id()) if model.eos_id() >= 0 else None


def _check_names_are_split(tokenizer: Tokenizer, encoder: Encoder) -> None:
    """Raise UserError if the name of a special token in a text gives a special token."""
    model = json.loads(tokenizer.to_json())["model"]
    added = encoder.get_added_tokens_decoder()
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    special[tokenizer.eos_token_id] = str(encoder.id_to_token(tokenizer.eos_token_id))
    # The unknown token stands for characters that have no piece, whatever they are.
    unknown = {model.get("unk_id"), encoder.token_to_id(model.get("unk_token") or "")}
    for name in special.values():
        for text in (name, f"a {name}", f"a{name}b", f"{name} {name}"):
            ids = tokenizer.encode(text)
            if reached := [token_id for token_id in ids if token_id in special and token_id not in unknown]:
                raise UserError(
                    f"{tokenizer.file}: with split_special_tokens no text may give a special token. Got {ids} for "
                    f"{text!r}, where {reached[0]} is {special[reached[0]]!r}. Name the SentencePiece .model it was "
                    "made of, train it again, or set split_special_tokens to false: the names of special tokens then "
                    "give these tokens."
                )


def _find(path: Path) -> Path:
    for file in (path / TOKENIZER_JSON, path / SENTENCEPIECE_MODEL) if path.is_dir() else (path,):
        if file.is_file():
            return file
        if _is_present(file):
            raise UserError(
                f"{file}: must be a regular file. Got something else, or a link to nothing. Put the file itself in its "
                "place."
            )
    raise UserError(f"No tokenizer at {path}: expected a {TOKENIZER_JSON}, a .model, or a folder that holds one.")


def _ids(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in encoder.encode_batch_fast(list(texts), add_special_tokens=False)]


def _can_split_into_words(model: dict[str, Any]) -> bool:
    """Whether splitting a text into WORDs changes no token: no piece may have a space after another character.

    A BPE without a pre-tokenizer, such as LLaMA-2's, takes a whole document as one word, which is slow and needs much
    memory.
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
    """``part`` of a tokenizer.json, changed so that it puts nothing before a text."""
    if isinstance(part, list):
        return [_without_prefix(step) for step in part if not (isinstance(step, dict) and _is_prefix(step))]
    if not isinstance(part, dict):
        return part
    changed = {key: value if key == "model" else _without_prefix(value) for key, value in part.items()}
    if _is_prefix(changed):
        return None
    if changed.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
    if changed.get("type") == "Strip" and "strip_left" in changed:
        changed["strip_left"] = False
    if changed.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed


def _is_prefix(step: dict[str, Any]) -> bool:
    """Whether a step of the normalisation concerns the spaces before a text."""
    return step.get("type") == "Prepend" or step.get("pattern") == {"Regex": LEADING_SPACES}


def _settings(file: Path) -> dict[str, Any]:
    return read_json_if_any(file, "the settings of a tokenizer")


def _token_id(encoder: Encoder, settings: dict[str, Any], key: str, file: Path) -> int | None:
    """The id of the token that ``key`` of tokenizer_config.json names; None where it names none."""
    token = settings.get(key)
    if token is None:
        return None
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        config_file = file.with_name(TOKENIZER_CONFIG)
        raise UserError(f"{config_file}: {key} must be a token, or an object whose content is one. Got {token!r}.")
    token_id = encoder.token_to_id(name)
    if token_id is None:
        raise UserError(f"{file}: {key} of {TOKENIZER_CONFIG} is {name!r}, which the vocabulary does not have.")
    return token_id
