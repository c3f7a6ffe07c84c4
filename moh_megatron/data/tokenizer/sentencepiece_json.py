"""Converts a SentencePiece model to a tokenizer of the ``tokenizers`` library with the same ids for every text.

Source: SentencePiece (github.com/google/sentencepiece). Its BPE merges, at each step, the leftmost of the adjacent
pairs whose concatenation is the piece with the best score; its Unigram takes the segmentation with the best sum of
scores. Neither ever finds a control, unknown or byte piece in a text. The ``tokenizers`` library knows no types of
pieces: its Unigram finds them like any other, so that they get a score that always loses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from moh_megatron.data.tokenizer.combining_marks import MARKED_TEXTS, composing_normalizers
from moh_megatron.data.tokenizer.names import LEADING_SPACES, SPACE, WORD
from moh_megatron.data.tokenizer.panics import panics_as_value_errors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)
"""Types of pieces, as SentencePiece numbers them."""
UNIGRAM_MODEL, BPE_MODEL = 1, 2
_NEVER = -1e6
"""The score of a Unigram piece that no text may give. The library's score of an unknown character is 10 below it."""
_MANY = 1 << 16
"""More spaces than a text begins with."""
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
    "E\u0301cole か\u3099 \u1112\u1161\u11ab Ａ",
    "closes <s>old</s> new",
    " ",
    "",
)
WHITE_SPACE = (
    *(" ", "  ", "\n", "\n\n", "\r", "\r\n", "\t", "\v", "\f", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003"),
    *("\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", SPACE, f" {SPACE} ", "\n "),
)


class NotEquivalentError(ValueError):
    """No tokenizer.json gives the ids of a model; ``remedy`` is a sentence that says what helps besides another one."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy


def to_tokenizer_json(model: bytes) -> Tokenizer:
    """The tokenizer of a serialised model. Raises ValueError with the reason if no tokenizer is equivalent."""
    proto = _parse(model)
    trained, cleaning = proto.trainer_spec, proto.normalizer_spec
    if trained.treat_whitespace_as_suffix:
        raise ValueError("it puts spaces at the end of pieces")
    if trained.model_type not in (BPE_MODEL, UNIGRAM_MODEL):
        raise ValueError("it is neither BPE nor Unigram")
    tokenizer: Any = Tokenizer((_bpe if trained.model_type == BPE_MODEL else _unigram)(proto))
    steps = _normalizers(cleaning)
    tokenizer.normalizer = normalizers.Sequence(steps)
    special = [entry.piece for entry in proto.pieces if entry.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    symbols = [entry.piece for entry in proto.pieces if entry.type == USER_DEFINED]
    if trained.model_type == BPE_MODEL:
        # A symbol that the normalisation would change is found in the text itself, as SentencePiece does it.
        tokenizer.add_tokens([AddedToken(symbol, normalized=_is_kept(symbol, steps)) for symbol in symbols])
        split = _word_split([entry.piece for entry in proto.pieces if entry.type == NORMAL], proto)
    else:
        # The best segmentation decides whether a Unigram's symbol is taken: it is a piece like the others.
        characters = [*_charsmap(cleaning), normalizers.Replace(" ", SPACE)]
        changed = [symbol for symbol in symbols if not _is_kept(symbol, characters)]
        tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in changed])
        split = [*_word_split([entry.piece for entry in _matched(proto)], proto), *_unknown_split(proto)]
    if split:
        tokenizer.pre_tokenizer = split[0] if len(split) == 1 else pre_tokenizers.Sequence(split)
    spaces = _MANY if cleaning.remove_extra_whitespaces else int(cleaning.add_dummy_prefix)
    strip = [decoders.Strip(" ", spaces, 0)] if spaces else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def from_model(model: bytes) -> tuple[Tokenizer, Any]:
    """The tokenizer of a model, compared with it on probe texts, and the model's processor.

    Raises ValueError with the reason if a text gives the id of a control piece, and NotEquivalentError with the
    shortest text whose ids differ.
    """
    try:
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
    except RuntimeError as error:
        raise ValueError(f"SentencePiece cannot read it: {error}") from None
    with panics_as_value_errors():
        tokenizer = to_tokenizer_json(model)
        tokenizer.encode_special_tokens = True
        proto = _parse(model)
        different = []
        for text in _probes(proto):
            ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
            if ids != expected and not _is_tie(tokenizer, ids, expected):
                different.append((text, ids, expected))
            elif control := [token_id for token_id in ids if processor.is_control(token_id)]:
                name = processor.id_to_piece(control[0])
                raise ValueError(f"{text!r} gives {ids}, where {control[0]} is the control piece {name!r}")
    if different:
        text, ids, expected = min(different, key=lambda difference: len(difference[0]))
        raise NotEquivalentError(f"{text!r} gives {ids}, and {expected} in SentencePiece", _remedy(proto))
    return tokenizer, processor


def _remedy(proto: Any) -> str:
    """What helps where the ids of a model with user symbols differ; nothing is known for others."""
    symbols = [entry.piece for entry in proto.pieces if entry.type == USER_DEFINED]
    if not symbols:
        return ""
    of_space = [symbol for symbol in symbols if not symbol.replace(SPACE, " ").strip()]
    if of_space:
        return f"Or train it again without the user symbols of white space: {of_space}."
    if proto.trainer_spec.model_type == BPE_MODEL and proto.normalizer_spec.add_dummy_prefix:
        return (
            f"Or train it again: with its user symbols {symbols[:9]} a BPE must put no space before a text "
            "(SentencePiece's add_dummy_prefix=false)."
        )
    return ""


def _is_tie(tokenizer: Tokenizer, ids: list[int], expected: list[int]) -> bool:
    """Whether a Unigram took the same pieces in another order, as in -- - and - --: their scores are the same.

    Which of them SentencePiece takes depends on how its sums of 32 bits are rounded.
    """
    is_unigram = isinstance(tokenizer.model, Unigram)
    return is_unigram and sorted(ids) == sorted(expected) and tokenizer.decode(ids) == tokenizer.decode(expected)


def _parse(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]


def _probes(proto: Any) -> Iterator[str]:
    """Texts of every kind: languages, white space at both ends and alone, the names of all pieces with a meaning."""
    yield from PROBES
    for space in WHITE_SPACE:
        yield from (space, 2 * space, f"{space}A line.{space}", f"A{space}line.", f"A {space} line.")
    for entry in proto.pieces:
        if entry.type != NORMAL:
            for name in sorted({entry.piece, entry.piece.replace(SPACE, " ")}):
                yield from (name, f"a{name}b {name}", f" {name} {name}{name}\n")


def _matched(proto: Any) -> list[Any]:
    """The pieces that SentencePiece's Unigram finds in a text."""
    return [entry for entry in proto.pieces if entry.type in (NORMAL, USER_DEFINED)]


def _bpe(proto: Any) -> Any:
    scores = {entry.piece: entry.score for entry in proto.pieces if entry.type == NORMAL}
    return BPE(
        vocab={entry.piece: token_id for token_id, entry in enumerate(proto.pieces)},
        merges=_merges(scores),
        unk_token=next(entry.piece for entry in proto.pieces if entry.type == UNKNOWN),
        fuse_unk=True,
        byte_fallback=bool(proto.trainer_spec.byte_fallback),
    )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges, best score first, those of one piece from left to right; both sides must be pieces themselves."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _unigram(proto: Any) -> Any:
    best = max((entry.score for entry in proto.pieces if entry.type == NORMAL), default=0.0)

    def score(entry: Any) -> float:
        if entry.type == USER_DEFINED:
            return len(entry.piece.encode("utf-8")) * max(best, 0.0) - 0.1  # as in SentencePiece's lattice
        return entry.score if entry.type == NORMAL else _NEVER

    return Unigram(
        [(entry.piece, score(entry)) for entry in proto.pieces],
        unk_id=next(token_id for token_id, entry in enumerate(proto.pieces) if entry.type == UNKNOWN),
        byte_fallback=bool(proto.trainer_spec.byte_fallback),
    )


def _word_split(pieces: list[str], proto: Any) -> list[Any]:
    """The split into words, where it changes no token: it keeps long documents fast.

    No piece may have a space after another character, and the space may not be part of a run of unknown characters,
    which are one token.
    """
    fuses_spaces = not proto.trainer_spec.byte_fallback and SPACE not in pieces
    if fuses_spaces or any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return []
    return [pre_tokenizers.Split(Regex(WORD), behavior="isolated")]


def _unknown_split(proto: Any) -> list[Any]:
    """The split of a Unigram's text that keeps characters without a piece apart.

    Without it the library would prefer a piece that must lose, such as <0x41>, to the unknown character in it. Split,
    each character costs the same in every segmentation, whatever its score. With bytes such a character stands alone;
    without, a run of them is one token.

    Raises ValueError if a piece has such a character: its score would matter.
    """
    singles = {entry.piece for entry in _matched(proto) if len(entry.piece) == 1}
    for entry in proto.pieces:
        if entry.type == NORMAL and (lacking := set(entry.piece) - singles) and len(entry.piece) > 1:
            raise ValueError(f"its piece {entry.piece!r} has the character {min(lacking)!r}, which is no piece itself")
    other = f"[^{''.join(map(re.escape, sorted(singles)))}]" if singles else "."
    symbols = sorted(
        (entry.piece for entry in proto.pieces if entry.type == USER_DEFINED and set(entry.piece) - singles),
        key=lambda symbol: (-len(symbol), symbol),
    )
    kept = "|".join(map(re.escape, symbols))
    outside = f"(?!{kept}){other}" if kept else other
    run = outside if proto.trainer_spec.byte_fallback else f"(?:{outside})+"
    return [pre_tokenizers.Split(Regex(f"{kept}|{run}" if kept else run), behavior="isolated")]


def _is_kept(symbol: str, steps: list[Any]) -> bool:
    """Whether the normalisation leaves ``symbol`` as it is."""
    return normalizers.Sequence(steps).normalize_str(symbol) == symbol


def _charsmap(cleaning: Any) -> list[Any]:
    """The normalisation of characters. The library applies it to a base with its marks as one, or to every character.

    So each of \\r\\n needs its own rule.
    """
    if not cleaning.precompiled_charsmap:
        return []
    rules = normalizers.Precompiled(cleaning.precompiled_charsmap)
    line_end = rules.normalize_str("\r")
    first = [] if line_end == "\r" else [normalizers.Replace("\r", line_end)]
    composes = rules.normalize_str("e\u0301") == "\u00e9"  # as all four of SentencePiece's own rules do
    return composing_normalizers(rules, first) if composes else [*first, rules]


def differing_marks(tokenizer: Tokenizer, processor: Any) -> tuple[str, list[int], list[int]] | None:
    """A text of letters with marks whose ids differ, its ids and those of SentencePiece; None if there is none.

    ``tokenizer`` must be that of ``from_model``. Such texts are rare, so that the difference is no reason to refuse.
    """
    for text in MARKED_TEXTS:
        ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != expected and not _is_tie(tokenizer, ids, expected):
            return text, ids, expected
    return None


def _normalizers(cleaning: Any) -> list[Any]:
    """SentencePiece's normalisation of characters, of spaces at the ends and runs of them, and the prefix."""
    characters = _charsmap(cleaning)
    # A text of which the normalisation leaves nothing gets the prefix too, unless spaces at the end are removed.
    prefix = [normalizers.Prepend(" " if characters else SPACE)] if cleaning.add_dummy_prefix else []
    if cleaning.remove_extra_whitespaces:
        # Not ``Strip``, which removes line ends too; not ^ and $, which are found at every line end.
        ends = [Regex(LEADING_SPACES), Regex(rf"[ {SPACE}]+\z")]
        spaces = [normalizers.Replace(end, "") for end in ends] + [normalizers.Replace(Regex(" {2,}"), " ")]
        steps = [*characters, *spaces, *prefix]
    else:
        steps = [*prefix, *characters]
    return [*steps, normalizers.Replace(" ", SPACE)]
