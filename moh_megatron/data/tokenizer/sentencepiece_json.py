"""Converts a SentencePiece model to a tokenizer of the ``tokenizers`` library with the same ids for every text.

Source: SentencePiece (github.com/google/sentencepiece). Its BPE merges, at each step, the leftmost of the adjacent
pairs whose concatenation is the piece with the best score; its Unigram takes the segmentation with the best sum of
scores.
"""

from __future__ import annotations

from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from moh_megatron.data.tokenizer.names import SPACE, WORD

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)
"""Types of pieces, as SentencePiece numbers them."""
UNIGRAM_MODEL, BPE_MODEL = 1, 2
PROBES = (
    "Hello, world! 1234567890",
    " a  b   c    ",
    "line\nline\r\n\n\ttab",
    "naïve café e\u0301 Å",
    "日本語のテキスト。中文,한국어 مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂 \u200b\ufeff",
    "\x00\x01\x7f\x85\u2585\ufffd\U0010ffff",
    "aaaaaaaaaaaa ----------- hahahahahaha",
    "def f(x):\n        return x**2  # ｆｕｌｌ ﬁ ½",
    " ",
    "",
)


def to_tokenizer_json(model: bytes) -> Tokenizer:
    """The tokenizer of a serialised model. Raises ValueError with the reason if no tokenizer is equivalent."""
    proto: Any = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    trained, cleaning = proto.trainer_spec, proto.normalizer_spec
    if trained.treat_whitespace_as_suffix:
        raise ValueError("it puts spaces at the end of pieces")
    pieces = [entry.piece for entry in proto.pieces]
    types = [entry.type for entry in proto.pieces]
    scores = {entry.piece: entry.score for entry in proto.pieces if entry.type == NORMAL}
    unknown = types.index(UNKNOWN)
    if trained.model_type == BPE_MODEL:
        core: Any = BPE(
            vocab={piece: token_id for token_id, piece in enumerate(pieces)},
            merges=_merges(scores),
            unk_token=pieces[unknown],
            fuse_unk=True,
            byte_fallback=bool(trained.byte_fallback),
        )
    elif trained.model_type == UNIGRAM_MODEL:
        core = Unigram(
            [(entry.piece, entry.score) for entry in proto.pieces],
            unk_id=unknown,
            byte_fallback=bool(trained.byte_fallback),
        )
    else:
        raise ValueError("it is neither BPE nor Unigram")
    tokenizer: Any = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(cleaning))
    # If no piece has a space after another character, splitting there changes no token and keeps long documents fast.
    if not any(SPACE in piece.lstrip(SPACE) for piece in scores):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    strip = [decoders.Strip(" ", 1, 0)] if cleaning.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece for piece, kind in zip(pieces, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    symbols = [piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(symbol, normalized=True) for symbol in symbols])
    return tokenizer


def from_model(model: bytes) -> tuple[Tokenizer, str | None]:
    """The tokenizer of a foreign model, compared with it on probe texts, and its end-of-sentence piece, if it has one.

    Raises ValueError with the reason if the ids would differ.
    """
    try:
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot read it: {error}") from None
    tokenizer = to_tokenizer_json(model)
    tokenizer.encode_special_tokens = True
    pieces = map(processor.id_to_piece, range(processor.get_piece_size()))
    symbols = [piece for token_id, piece in enumerate(pieces) if _is_user_symbol(processor, token_id)]
    for text in (*PROBES, *(f"a{piece}b {piece}" for piece in symbols)):
        ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != expected:
            raise ValueError(f"{text!r} gives {ids}, and {expected} in SentencePiece")
    eos_token_id = processor.eos_id()
    return tokenizer, processor.id_to_piece(eos_token_id) if eos_token_id >= 0 else None


def _is_user_symbol(processor: Any, token_id: int) -> bool:
    """Whether the piece is user-defined: it scores 0 and is of no other type that does."""
    other = processor.is_control(token_id), processor.is_unknown(token_id), processor.is_byte(token_id)
    return processor.get_score(token_id) == 0 and not any(other)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges, best score first, those of one piece from left to right; both sides must be pieces themselves."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _normalizers(cleaning: Any) -> list[Any]:
    steps: list[Any] = []
    if cleaning.precompiled_charsmap:
        steps.append(normalizers.Precompiled(cleaning.precompiled_charsmap))
    if cleaning.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if cleaning.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]
