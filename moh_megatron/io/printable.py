"""Makes text from outside safe to print: file names, documents, messages of other processes, values of headers."""

from __future__ import annotations

import re

# C0 controls but tab and newline, DEL and C1; marks, embeddings, overrides and isolates of the writing direction;
# line separators that some terminals obey; half characters, which no encoding can print.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""``text`` with escapes such as \x1b or \u202e for what a terminal would obey in place of showing it.

    Newlines and tabs stay.
    """
    return _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
