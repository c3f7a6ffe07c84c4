"""Trains a SentencePiece BPE or Unigram model and exports it as the tokenizer.json that encodes exactly as it does.

Everything reads the exported form, since transformers 5 reads a SentencePiece .model with other results.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece

from moh_megatron.data.tokenizer.names import SPACE, TOKENIZER_CONFIG, TOKENIZER_JSON
from moh_megatron.data.tokenizer.sentencepiece_json import from_model
from moh_megatron.io.errors import UserError

UNKNOWN = "<unk>"
EOS_TOKEN = "</s>"
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    character_coverage: float,
    out_dir: Path,
    model_type: Literal["bpe", "unigram"] = "bpe",
    user_symbols: Sequence[str] = (),
) -> None:
    """Train on ``texts`` and write tokenizer.model, tokenizer.json and tokenizer_config.json into ``out_dir``.

    With byte fallback any text can be encoded and decodes to itself. The text is not normalised and no space is added
    or removed. Pieces hold no line ends, and spaces only at their start. ``character_coverage`` is the share of the
    characters of the texts that get a piece of their own; the others are encoded as bytes. Each of ``user_symbols``
    becomes one token, wherever it occurs; in a Unigram, unless a better segmentation cuts it. The same texts give the
    same files.

    Raises UserError if the texts cannot give exactly ``vocab_size`` entries, and for user symbols that no text may
    give or that tokenizer.json cannot express.
    """
    for symbol in user_symbols:
        if symbol in ("", EOS_TOKEN, UNKNOWN) or _BYTE_PIECE.fullmatch(symbol):
            raise UserError(
                f"tokenizer.user_symbols: {symbol!r} cannot be a text of its own: it is empty or the name of a special "
                "token, which no text may give. Take it out."
            )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            user_defined_symbols=list(dict.fromkeys(symbol.replace(" ", SPACE) for symbol in user_symbols)),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # longer lines would be dropped silently
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the number is written into the model, so another one would change the file
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explanation(str(error), vocab_size)) from None
    try:
        exported = from_model(model.getvalue())[0].to_str(pretty=True)
    except ValueError as error:
        raise UserError(
            f"tokenizer.user_symbols {list(user_symbols)}: no tokenizer.json gives the tokens of SentencePiece with "
            f"them ({error}). Leave out those that hold spaces, or set tokenizer.algorithm to byte_level_bpe."
        ) from None
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "tokenizer.model").write_bytes(model.getvalue())
    (out_dir / TOKENIZER_JSON).write_text(exported + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # In training every document but the first follows this token, so it marks the beginning as well.
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out_dir / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    return (line for text in texts for line in text.split("\n") if line)


def _explanation(error: str, vocab_size: int) -> str:
    """A message to the user for what SentencePiece reported."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", error):
        return (
            f"model.vocab_size is {vocab_size}, more than the text of data.inputs can fill: at most {most[1]}. "
            "Lower it, or give more text, or name a tokenizer in tokenizer.path."
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return (
            f"model.vocab_size is {vocab_size}, too small for the characters of data.inputs and the 256 bytes: "
            f"at least {least[1]}. Raise it, or lower tokenizer.character_coverage."
        )
    if "sentences_.empty()" in error:
        return "data.inputs holds no text to train a tokenizer on."
    return f"SentencePiece could not train a tokenizer on data.inputs: {error}"
