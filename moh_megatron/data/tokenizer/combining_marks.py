"""Normalises letters with marks as SentencePiece's NFKC rules do, with normalizers of the ``tokenizers`` library.

SentencePiece replaces the longest sequence that has a rule, from left to right: a letter and its marks are composed
where they stand in Unicode's canonical order, else left as they are, and a composed letter takes no further mark. The
library's NFC reorders and composes all of them; its precompiled rules look up a letter with its marks as one, and
forget the marks where there is a rule for the letter alone. Both act on what stands together, so that a guard is put
before the marks that must stay apart.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Regex, normalizers

_GUARD = "\U000e0002"
"""A code point without a character, at which Unicode ends a letter with its marks. A text that holds it loses it."""
_KANA = r"[\x{3040}-\x{30ff}\x{ff66}-\x{ff9d}]"
_KANA_MARKS = r"[\x{3099}\x{309a}\x{ff9e}\x{ff9f}]"
_EXTENDING = r"[[\p{M}&&[^\x{3099}\x{309a}]]\x{200c}\x{200d}\x{1f3fb}-\x{1f3ff}\x{e0020}-\x{e007f}]"
"""What belongs to the letter before it: marks, joiners, skin colours, tags."""
_INSIDE = r"(?<=[\x{0}-\x{10ffff}])"
"""Behind a character: the library fails where something is put before the first one of a text."""
_MARKS_END = 0x1F000
"""Above all combining marks and letters that are composed with one."""
MARKED_TEXTS = (
    "\u0645\u0651\u064e\u062d\u0651\u064f \ufefb\u064e \ufee3\u0652",  # Arabic: shadda, then a vowel; positional forms
    "\u05e9\u05c1\u05bc\u05b8\u05d1\u05bc\u05b7",  # Hebrew: dagesh, then a vowel
    "ti\u00ea\u0301ng Vi\u00ea\u0323t tie\u0302\u0301ng o\u031b\u0301",  # Vietnamese: a composed letter, then a tone
    "\u1eb8\u0301k\u1ecd\u0301 E\u0323\u0301 O\u0301\u0323",  # Yoruba
    "\u03b1\u0313\u0342\u0345 \u1f00\u0301 \u0391\u0314",  # Greek
    "\uff76\uff9e\uff8a\uff9f \u304b\u3099 \uffa1\uffc2",  # Japanese and Korean of half width
    "\ufb01\u0301 \u00bd\u0302 q\u0301\u0323 \u0915\u093c \u1112\u1161\u11ab",
)
"""Letters with marks as they occur in texts, in canonical order and in the order in which they are typed."""


def composing_normalizers(rules: Any, line_end: list[Any]) -> list[Any]:
    """The steps that normalise characters as ``rules``, one of SentencePiece's precompiled NFKC rules, do there.

    ``line_end`` are steps to be taken before the rules.
    """
    apart = normalizers.Replace(Regex(_marks_left_apart()), _GUARD)
    # Japanese letters and marks of half width are composed with what the rules make of them.
    after_rules = normalizers.Replace(Regex(rf"{_INSIDE}(?:(?={_EXTENDING})|(?<!{_KANA})(?={_KANA_MARKS}))"), _GUARD)
    nfc = normalizers.NFC()
    return [apart, nfc, *line_end, after_rules, rules, nfc, normalizers.Replace(_GUARD, "")]


@cache
def _marks_left_apart() -> str:
    """Regular expression of the place before a mark that NFC would reorder, or compose with a composed letter.

    So it would a mark that stands for two, which SentencePiece's rules take apart: the place before it too.
    """
    by_class: dict[int, list[int]] = defaultdict(list)
    composed, double_marks = [], []
    for code in range(_MARKS_END):
        character = chr(code)
        if order := unicodedata.combining(character):
            by_class[order].append(code)
        if (decomposition := unicodedata.decomposition(character)) and not decomposition.startswith("<"):
            composed.append(code)
            first, *others = decomposition.split()
            if others and unicodedata.combining(chr(int(first, 16))):
                double_marks.append(code)
    descents = [
        f"(?<={_class(later)})(?={_class(codes)})"
        for order, codes in by_class.items()
        if (later := [code for other, others in by_class.items() if other > order for code in others])
    ]
    apart = [f"(?<={_class(composed)})", rf"(?<=\p{{M}})(?:{'|'.join(descents)})", f"(?={_class(double_marks)})"]
    return rf"{_INSIDE}(?=\p{{M}})(?:{'|'.join(apart)})"


def _class(codes: Iterable[int]) -> str:
    """A class of regular expressions of the code points, in the syntax of the tokenizers library."""
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "[" + "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in ranges) + "]"
