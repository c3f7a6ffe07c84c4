"""What lies beside a model's weights, tokenizer and generation_config.json, as Transformers opens it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer as Encoder
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moh_megatron.checkpoint.hf.hf_config_reader import check_token_ids
from moh_megatron.checkpoint.hf.hf_extras import GENERATION, GENERATION_SETTINGS
from moh_megatron.checkpoint.hf.transformers_io import quiet, refusing
from moh_megatron.data.tokenizer.names import CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG, TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.json_file import read_json, read_json_if_any

_PROBE = "The quick brown fox, 1234 times:\n\tnaïve  façade — 漢字 🙂 </s> <0x41>."


def check_generation(folder: Path, entries: int) -> None:
    """Raise UserError where the folder's generation_config.json, if it has one, is none of a model of ``entries``."""
    file = folder / GENERATION
    if os.path.lexists(file):
        content = read_json(file, GENERATION_SETTINGS)
        check_token_ids(file, content, entries)
        try:
            with quiet(), refusing(file, "settings"):
                GenerationConfig.from_dict(content)
        except UserError:
            # What Transformers raises seldom names the setting.
            for name, value in content.items():
                with quiet(), refusing(file, f"a {name}"):
                    GenerationConfig.from_dict({name: value})
            raise


def check_tokenizer(tokenizer: Tokenizer, entries: int) -> None:
    """Raise UserError where Transformers would not read ``tokenizer`` in an export of a model of ``entries`` tokens."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write(tokenizer, folder)
        with quiet(), refusing(tokenizer.folder, "a tokenizer"):
            # Unlike AutoTokenizer it runs no code, whatever the files name.
            opened = PreTrainedTokenizerFast.from_pretrained(folder)
        got = _encoded(tokenizer, opened, entries)
    if got != (expected := tokenizer.encode(_PROBE)):
        raise UserError(
            f"{tokenizer.folder}: Transformers must read the tokenizer as {tokenizer.file.name} alone says: {expected} "
            f"for {_PROBE!r}. Got {got}: {TOKENIZER_CONFIG} or {SPECIAL_TOKENS_MAP} changes it."
        )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, entries: int) -> None:
    """Write ``tokenizer`` into the ``folder`` of a model of ``entries`` tokens, as AutoTokenizer opens it.

    Raises:
        UserError: Transformers does not open it, or finds more than ``entries`` in it.
        Fault: Transformers reads it otherwise than it was trained.
    """
    _write(tokenizer, folder)
    # Without trust_remote_code a terminal is asked about the model's code, which the tokenizer does not even need.
    with quiet(), refusing(tokenizer.folder, "a tokenizer"):
        opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if (got := _encoded(tokenizer, opened, entries)) != (expected := tokenizer.encode(_PROBE)):
        raise Fault(
            f"{folder}: transformers reads {TOKENIZER_JSON} otherwise than it was trained: {got}, not {expected}."
        )


def _write(tokenizer: Tokenizer, folder: Path) -> None:
    """Fill ``folder``. Raises UserError where a file is no text of its kind, which Transformers would not name."""
    read_json_if_any(tokenizer.folder / SPECIAL_TOKENS_MAP, "the special tokens of a tokenizer")
    template = tokenizer.folder / CHAT_TEMPLATE
    try:
        if template.is_file():
            template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{template}: must be text in UTF-8 ({error}).") from None
    tokenizer.save(folder)
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    longest = settings.get("model_max_length", 1)
    if isinstance(longest, bool) or not isinstance(longest, int | float | None):
        place = tokenizer.folder / TOKENIZER_CONFIG
        raise UserError(f"{place}: model_max_length must be a number. Got {longest!r}.")
    # Other classes rebuild the tokenizer from its vocabulary; this one takes tokenizer.json as it is.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    # An imported one may name code of its own.
    settings.pop("auto_map", None)
    encoder = Encoder.from_file(str(folder / TOKENIZER_JSON))
    settings.setdefault("eos_token", encoder.id_to_token(tokenizer.eos_token_id))
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    # Half a character, which JSON can write and UTF-8 cannot, is left to Transformers to refuse.
    file.write_bytes(text.encode("utf-8", errors="surrogatepass"))


def _encoded(tokenizer: Tokenizer, opened: PreTrainedTokenizerBase, entries: int) -> list[int]:
    """The probe's ids. Raises UserError where ``opened`` holds a token beyond ``entries``, or cannot encode."""
    added = sorted((number, token) for token, number in opened.get_vocab().items() if number >= entries)
    if added:
        number, token = added[0]
        raise UserError(
            f"{_naming(tokenizer.folder, token)}: every token must be one of the model's, 0 to {entries - 1}. Got "
            f"{token!r}, which {tokenizer.file.name} does not hold: Transformers makes it token {number}. Take it out, "
            "or put a token of the vocabulary in its place."
        )
    with refusing(tokenizer.folder, "a tokenizer"):
        return opened(_PROBE, add_special_tokens=False)["input_ids"]


def _naming(folder: Path, token: str) -> Path:
    """The file in ``folder`` that names a token which tokenizer.json lacks; the folder itself where none shows it."""
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        if any(each in text for each in (json.dumps(token), json.dumps(token, ensure_ascii=False))):
            return folder / name
    return folder
