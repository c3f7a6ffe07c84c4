"""Documents as pieces of bounded size: what is encoded at once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 1 << 20
"""Bytes of a piece: encoding takes some hundred times as much memory for a moment."""
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")
_AROUND = 32
"""Characters looked at on each side of a cut: longer than any sequence that Unicode normalisation joins."""


class Piece(NamedTuple):
    """A stretch of a document; most documents are one piece."""

    text: str
    utf8: bytes
    last: bool


def whole(text: str, limit: int, form: str) -> Iterator[Piece]:
    """A document at hand. Raises UnicodeEncodeError for a lone surrogate."""
    text = normalised(text, form)
    utf8 = text.encode("utf-8")
    if len(utf8) <= limit:
        yield Piece(text, utf8, True)
    else:
        yield from streamed([text], limit, "none")


def streamed(chunks: Iterable[str], limit: int, form: str) -> Iterator[Piece]:
    """A document in one piece, or above ``limit`` bytes of UTF-8 in pieces of at most PIECE (before normalisation).

    A piece ends behind the last line end it can hold, else before its last white space, else between two characters.
    The pieces together are the document.
    """
    held, size = [], 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk.encode("utf-8"))
        if size > limit:
            utf8 = "".join(held).encode("utf-8")
            start = 0
            limit = min(limit, PIECE)
            while size - start > limit:
                text = _first_piece(utf8[start : start + limit], form)
                yield _piece(text, form, last=False)
                start += len(text.encode("utf-8"))
            held, size = [utf8[start:].decode("utf-8")], size - start
    yield _piece("".join(held), form, last=True)


def normalised(text: str, form: str) -> str:
    """``form``: none, nfc or nfkc."""
    return text if form == "none" or text.isascii() else unicodedata.normalize(form.upper(), text)  # pyright: ignore[reportArgumentType]


def _piece(text: str, form: str, last: bool) -> Piece:
    text = normalised(text, form)
    return Piece(text, text.encode("utf-8"), last)


def _first_piece(window: bytes, form: str) -> str:
    if line_end := window.rfind(b"\n") + 1:
        return window[:line_end].decode("utf-8")
    text = window.decode("utf-8", errors="ignore")  # its end may lie inside a character
    if (space := _LAST_SPACE.search(text)) and space.start():
        return text[: space.start()]
    cut = len(text)
    while form != "none" and cut > 1 and not _parts_at(text, cut - 1, form):
        cut -= 1
    return text[: cut - 1] if form != "none" and cut > 1 else text


def _parts_at(text: str, cut: int, form: str) -> bool:
    """Whether the two sides of a cut can be normalised apart."""
    left, right = text[max(0, cut - _AROUND) : cut], text[cut : cut + _AROUND]
    return normalised(left + right, form) == normalised(left, form) + normalised(right, form)
