"""Trains a byte-level BPE with the tokenizers library: GPT-2's split into words, and a token for every byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from moh_megatron.data.tokenizer.names import TOKENIZER_CONFIG, TOKENIZER_JSON
from moh_megatron.io.errors import UserError

EOS_TOKEN = "<|endoftext|>"


def train_byte_level_bpe(
    texts: Iterable[str], *, vocab_size: int, user_symbols: Sequence[str] = (), out_dir: Path
) -> None:
    """Train on ``texts`` and write tokenizer.json and tokenizer_config.json into ``out_dir``.

    Each of ``user_symbols`` becomes one token, wherever it occurs; merges of other tokens may give the same one. The
    same texts give the same files.

    Raises UserError if the texts cannot give exactly ``vocab_size`` entries, and for user symbols that no text may
    give or that would not be decoded to themselves.
    """
    for symbol in user_symbols:
        if symbol in ("", EOS_TOKEN):
            raise UserError(
                f"tokenizer.user_symbols: {symbol!r} cannot be a text of its own: it is empty or the name of a special "
                "token, which no text may give. Take it out."
            )
    added = [AddedToken(content, normalized=False) for content in dict.fromkeys((EOS_TOKEN, *user_symbols))]
    tokenizer = _untrained()
    tokenizer.add_tokens(added)
    for symbol in user_symbols:
        ids = tokenizer.encode(symbol).ids
        if (decoded := tokenizer.decode(ids)) != symbol:
            raise UserError(
                f"tokenizer.user_symbols: {symbol!r} must be decoded to itself. Got {decoded!r}, since byte_level_bpe "
                "writes bytes with some of its characters. Take it out, or set tokenizer.algorithm to "
                "sentencepiece_bpe."
            )
    tokenizer = _untrained()
    trainer: Any = BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore[reportCallIssue]
        special_tokens=added,  # so that a symbol is an entry of its own even where merges give its characters
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    entries = tokenizer.get_vocab_size(with_added_tokens=True)
    if entries != vocab_size:
        too_small = "too small for the 256 bytes and tokenizer.user_symbols"
        reason = "more than the text of data.inputs can fill" if entries < vocab_size else too_small
        raise UserError(
            f"model.vocab_size is {vocab_size}, {reason}: it gives {entries}. Set it so, give more text, or name a "
            "tokenizer in tokenizer.path."
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] == EOS_TOKEN  # the trainer makes all of them special
    tokenizer = Tokenizer.from_str(json.dumps(content))
    (out_dir / TOKENIZER_JSON).write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (out_dir / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _untrained() -> Any:
    tokenizer: Any = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
