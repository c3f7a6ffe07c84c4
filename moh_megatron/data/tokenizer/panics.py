"""Makes errors of the panics of the tokenizers library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TokenizersPanic(ValueError):
    """The tokenizers library failed where it expects never to."""


@contextmanager
def panics_as_value_errors() -> Iterator[None]:
    """Turn a panic of the tokenizers library, whose own class is no Exception and has no public name, into an error."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise TokenizersPanic(f"the tokenizers library fails: {error}") from None
