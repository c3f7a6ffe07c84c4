"""Rows for the pieces that a tokenizer has grown by: each the mean of those it splits into.

Legend: V entries of the old tokenizer, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import UserError


def new_pieces(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """For each entry of ``new`` that ``old`` lacks, the entries of ``old`` it is put together from.

    A piece of a BPE splits as its merges joined it; an added token, as ``old`` encodes its text.

    Raises:
        UserError: ``new`` is no grown ``old``: an entry has another number, or a piece no merges that lead to it.
    """
    settings = json.loads(new.to_json())
    before, after = (_entries(json.loads(each.to_json())) for each in (old, new))
    if moved := [piece for piece, number in before.items() if after.get(piece) != number]:
        raise UserError(
            f"{new.file} must hold every entry of {old.file} under its old number to start from that model. "
            f"{len(moved)} differ, such as {moved[0]!r}. Grow the model's own tokenizer: tokenizer.path and "
            "tokenizer.grow_to."
        )
    added = {each["content"] for each in settings["added_tokens"]}
    merges: dict[str, tuple[str, str]] = {}
    for each in settings["model"].get("merges", ()):
        left, right = each.split(" ") if isinstance(each, str) else each
        merges.setdefault(left + right, (left, right))

    def split(piece: str) -> list[int]:
        if (number := before.get(piece)) is not None:
            return [number]
        if piece not in merges:
            raise UserError(
                f"{new.file}: no merges lead to the piece {piece!r}, which {old.file} lacks: no row for it can be made."
            )
        left, right = merges[piece]
        return split(left) + split(right)

    return {
        number: old.encode(piece) if piece in added else split(piece)
        for piece, number in after.items()
        if piece not in before
    }


def _entries(settings: dict[str, Any]) -> dict[str, int]:
    return settings["model"]["vocab"] | {each["content"]: each["id"] for each in settings["added_tokens"]}


def grown_rows(rows: Tensor, pieces: Mapping[int, Sequence[int]], size: int) -> Tensor:
    """[V, D] -> [size, D]: the old rows, then the mean of the old rows of each new entry's ``pieces``.

    What no entry uses gets the mean of all old rows.
    """
    grown = rows.new_empty(size, rows.shape[1])
    grown[: len(rows)] = rows
    grown[len(rows) :] = rows.float().mean(0)
    for number, parts in pieces.items():
        grown[number] = rows[torch.tensor(parts)].float().mean(0)
    return grown
