"""Splits documents into chunks of bounded size, each of which is encoded at once."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple

LONGEST_CHUNK = 1 << 20
"""Bytes of UTF-8 of a chunk; encoding takes about a hundred times as much memory for a moment."""
_LAST_SPACE = re.compile(r"\s(?=\S*\Z)")
_CONTEXT = 32
"""Characters compared on each side of a cut: longer than any sequence that Unicode normalisation joins."""


class Chunk(NamedTuple):
    """A part of a document's text; most documents are one chunk."""

    text: str
    utf8: bytes
    last: bool
    """Whether the document ends with this chunk."""


def document_chunks(text: str, limit: int, form: str) -> Iterator[Chunk]:
    """``stream_chunks`` for a document in memory. Raises UnicodeEncodeError for a lone surrogate."""
    text = normalise(text, form)
    utf8 = text.encode("utf-8")
    if len(utf8) <= limit:
        yield Chunk(text, utf8, True)
    else:
        yield from stream_chunks([text], limit, "none")


def stream_chunks(texts: Iterable[str], limit: int, form: str) -> Iterator[Chunk]:
    """The document whose text comes in ``texts``, as one chunk, or above ``limit`` bytes of UTF-8 as several.

    Each of several chunks has at most LONGEST_CHUNK bytes before normalisation. It ends after the last line end that
    fits, else before the last white space that does, else between two characters. Joined, the chunks give the document.
    """
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text.encode("utf-8"))
        if size > limit:
            utf8 = "".join(held).encode("utf-8")
            start = 0
            limit = min(limit, LONGEST_CHUNK)
            while size - start > limit:
                first = _first_chunk(utf8[start : start + limit], form)
                yield _chunk(first, form, last=False)
                start += len(first.encode("utf-8"))
            held, size = [utf8[start:].decode("utf-8")], size - start
    yield _chunk("".join(held), form, last=True)


def normalise(text: str, form: str) -> str:
    """``text`` in the Unicode normalisation ``form``: none, nfc or nfkc."""
    return text if form == "none" or text.isascii() else unicodedata.normalize(form.upper(), text)  # pyright: ignore[reportArgumentType]


def _chunk(text: str, form: str, last: bool) -> Chunk:
    text = normalise(text, form)
    return Chunk(text, text.encode("utf-8"), last)


def _first_chunk(window: bytes, form: str) -> str:
    """The text of the chunk that begins with ``window``, the most bytes it may have; not normalised yet."""
    if line_end := window.rfind(b"\n") + 1:
        return window[:line_end].decode("utf-8")
    text = window.decode("utf-8", errors="ignore")  # the window may end inside a character
    if (space := _LAST_SPACE.search(text)) and space.start():
        return text[: space.start()]
    cut = len(text)
    while form != "none" and cut > 1 and not _can_cut(text, cut - 1, form):
        cut -= 1
    return text[: cut - 1] if form != "none" and cut > 1 else text


def _can_cut(text: str, cut: int, form: str) -> bool:
    """Whether the two sides of a cut, normalised separately, give the normalised text."""
    left, right = text[max(0, cut - _CONTEXT) : cut], text[cut : cut + _CONTEXT]
    return normalise(left + right, form) == normalise(left, form) + normalise(right, form)
