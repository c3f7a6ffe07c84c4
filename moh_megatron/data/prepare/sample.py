"""Text to train a tokenizer on: a bounded sample, spread over the whole corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare.inputs import Input, Part
from moh_megatron.data.prepare.lines import Advance
from moh_megatron.data.prepare.pieces import Piece
from moh_megatron.data.prepare.read_documents import Reject, read_segment
from moh_megatron.io.errors import UserError

TOLD = 5
"""Rejects that a message quotes."""


def sample_texts(
    inputs: Sequence[Input], parts: Sequence[Part], data: DataConfig, most_bytes: int, advance: Advance
) -> Iterator[str]:
    """Texts of at most about ``most_bytes`` of UTF-8, in order: from the beginning of each part its share of them.

    A corpus that is smaller is given whole. The same corpus gives the same sample. Rejects are passed over; raises
    UserError where nothing else is there.
    """
    found, rejects = False, []
    total = sum(segment.bytes for part in parts for segment in part)
    for part in parts:
        size = sum(segment.bytes for segment in part)
        left = most_bytes * size // total if total else most_bytes // len(parts)
        for segment in part:
            for event in read_segment(inputs[segment.input], segment, data, advance) if left > 0 else ():
                if isinstance(event, Reject) and len(rejects) < TOLD:
                    rejects.append(f"\n{inputs[segment.input].name}, line {event.line}: {event.reason}")
                if isinstance(event, Piece):
                    found = True
                    yield event.text
                    left -= len(event.utf8)
                    if left <= 0:
                        break
    if rejects and not found:
        raise UserError("data.inputs holds no text to train a tokenizer on, but rejects:" + "".join(rejects))
