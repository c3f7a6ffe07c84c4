"""Writes tokenizers for exports, and checks tokenizers and generation_config.json as Transformers opens them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer as Encoder
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moh_megatron.checkpoint.hf.hf_config_reader import check_token_ids
from moh_megatron.checkpoint.hf.hf_extras import GENERATION, GENERATION_SETTINGS
from moh_megatron.checkpoint.hf.hf_folder import CONFIG
from moh_megatron.checkpoint.hf.transformers_io import as_user_error, quiet
from moh_megatron.data.tokenizer.names import CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.json_file import read_json, read_json_if_any
from moh_megatron.io.small_file import read_small_text

_PROBE = "The quick brown fox, 1234 times:\n\tnaïve  façade — 漢字 🙂 </s> <0x41>.\n"
_WITH = {False: "", True: " with special tokens around it"}
_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""The files that AutoTokenizer may read."""


def check_generation(folder: Path, vocab_size: int) -> None:
    """Raise UserError if the folder has a generation_config.json that does not fit a model of ``vocab_size`` tokens."""
    file = folder / GENERATION
    if os.path.lexists(file):
        content = read_json(file, GENERATION_SETTINGS)
        check_token_ids(file, content, vocab_size)
        try:
            with quiet(), as_user_error(file, "settings"):
                GenerationConfig.from_dict(content)
        except UserError:
            # The errors of Transformers seldom name the setting.
            for name, value in content.items():
                with quiet(), as_user_error(file, f"a {name}"):
                    GenerationConfig.from_dict({name: value})
            raise


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise UserError if Transformers could not open ``tokenizer`` in an export of a model of ``vocab_size`` tokens."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write(tokenizer, folder)
        with quiet(), as_user_error(tokenizer.folder, "a tokenizer"):
            # Unlike AutoTokenizer, this class runs no code that the files name.
            opened = PreTrainedTokenizerFast.from_pretrained(folder)
        _check_vocabulary(tokenizer, opened, vocab_size)
        for got, expected, text in _differences(tokenizer, opened):
            raise UserError(
                f"{tokenizer.folder}: Transformers must read the tokenizer as {tokenizer.file.name} alone says: "
                f"{expected} for {text}. Got {got}: {TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP} changes it."
            )
    _check_special_tokens(tokenizer)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """Write ``tokenizer`` into the ``folder`` of a model of ``vocab_size`` tokens, as AutoTokenizer opens it.

    Raises:
        UserError: Transformers does not open the tokenizer, or finds more than ``vocab_size`` tokens in it.
        Fault: Transformers encodes a text differently from the tokenizer that was trained.
    """
    _write(tokenizer, folder)
    # Without trust_remote_code, Transformers asks on the terminal about the model's code, though no tokenizer needs it.
    with quiet(), as_user_error(tokenizer.folder, "a tokenizer"):
        opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    _check_vocabulary(tokenizer, opened, vocab_size)
    for got, expected, text in _differences(tokenizer, opened):
        raise Fault(
            f"{folder}: transformers reads {TOKENIZER_JSON} differently from how it was trained: {got}, not "
            f"{expected}, for {text}."
        )


def _differences(tokenizer: Tokenizer, opened: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[int], str]]:
    """The ids that ``opened`` gives for the probe, those expected, and the probe's description, where they differ."""
    for special in (False, True):
        got, expected = _encode_probe(tokenizer.folder, opened, special), _expected(tokenizer, special)
        if got != expected:
            yield got, expected, f"{_PROBE!r}{_WITH[special]}"


def _check_special_tokens(tokenizer: Tokenizer) -> None:
    """Raise UserError if AutoTokenizer puts other special tokens around a text than ``tokenizer``, which an export has.

    It opens copies of the tokenizer's files that name no code.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in tokenizer.folder.iterdir():
            if file.is_file() and file.suffix in _SUFFIXES and file.name not in (CONFIG, TOKENIZER_CONFIG):
                (folder / file.name).symlink_to(file.resolve())
        config = read_json_if_any(tokenizer.folder / CONFIG, "the configuration of a model")
        settings = read_json_if_any(tokenizer.folder / TOKENIZER_CONFIG, "the settings of a tokenizer")
        for file, content, keys in ((CONFIG, config, ("model_type",)), (TOKENIZER_CONFIG, settings, None)):
            kept = {key: value for key, value in content.items() if key != "auto_map" and (keys is None or key in keys)}
            (folder / file).write_text(json.dumps(kept), encoding="utf-8")
        try:
            with quiet(), as_user_error(tokenizer.folder, "a tokenizer"):
                original = AutoTokenizer.from_pretrained(folder)
                inner, whole = (_encode_probe(tokenizer.folder, original, special) for special in (False, True))
        except UserError:
            return  # What only code of its own opens is exported as its tokenizer.json says.
    got = _around(_expected(tokenizer, False), _expected(tokenizer, True))
    if got != (expected := _around(inner, whole)):
        raise UserError(
            f"{tokenizer.folder}: an export must put the special tokens around a text that AutoTokenizer puts there: "
            f"{expected[0]} before and {expected[1]} after it. Got {got[0]} and {got[1]} from {tokenizer.file.name}. "
            f"Write {TOKENIZER_JSON} anew with AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )


def _around(inner: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    """What ``whole`` has before and after ``inner``."""
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return whole, []


def _expected(tokenizer: Tokenizer, special: bool) -> list[int]:
    return tokenizer.encode(_PROBE, add_special_tokens=special)


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    """Fill ``folder``. Raises UserError for a broken file that the errors of Transformers would not name."""
    read_json_if_any(tokenizer.folder / SPECIAL_TOKENS_MAP, "the special tokens of a tokenizer")
    template = tokenizer.folder / CHAT_TEMPLATE
    try:
        if template.is_file():
            read_small_text(template)
    except UnicodeDecodeError as error:
        raise UserError(f"{template}: must be text in UTF-8 ({error}).") from None
    tokenizer.save(folder)
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    max_length = settings.get("model_max_length", 1)
    if isinstance(max_length, bool) or not isinstance(max_length, int | float | None):
        source = tokenizer.folder / TOKENIZER_CONFIG
        raise UserError(f"{source}: model_max_length must be a number. Got {max_length!r}.")
    # Other classes rebuild the tokenizer from its vocabulary; this one reads tokenizer.json unchanged.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # An imported tokenizer may name code of its own.
    settings.pop("auto_map", None)
    encoder = Encoder.from_file(str(folder / TOKENIZER_JSON))
    settings.setdefault("eos_token", encoder.id_to_token(tokenizer.eos_token_id))
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    # JSON can hold half of a surrogate pair, UTF-8 cannot: Transformers refuses such a file.
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))


def _check_vocabulary(tokenizer: Tokenizer, opened: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise UserError if ``opened`` has an id of ``vocab_size`` or above."""
    added = sorted((token_id, token) for token, token_id in opened.get_vocab().items() if token_id >= vocab_size)
    if added:
        token_id, token = added[0]
        file = _file_with(tokenizer.folder, token)
        raise UserError(
            f"{file}: every token must be one of the model's, 0 to {vocab_size - 1}. Got {token!r}, which "
            f"{tokenizer.file.name} does not hold: Transformers makes it token {token_id}. Take it out, or put a token "
            "of the vocabulary in its place."
        )


def _encode_probe(folder: Path, opened: PreTrainedTokenizerBase, special: bool) -> list[int]:
    """Encode the probe, with special tokens around it or without. Raises UserError if ``opened`` cannot."""
    with as_user_error(folder, "a tokenizer"):
        return opened(_PROBE, add_special_tokens=special)["input_ids"]


def _file_with(folder: Path, token: str) -> Path:
    """Return the file in ``folder`` that names ``token``, which tokenizer.json lacks, or else ``folder``."""
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        text = read_small_text(folder / name) if (folder / name).is_file() else ""
        if any(json.dumps(token, ensure_ascii=ascii_only) in text for ascii_only in (True, False)):
            return folder / name
    return folder
