"""Makes embedding rows for the new entries of a grown tokenizer: the mean of the rows of the pieces they split into.

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
    """For each entry of ``new`` that ``old`` lacks, the entries of ``old`` that it splits into: {new id: old ids}.

    A BPE piece splits by its merges; an added token splits as ``old`` encodes its text.

    Raises:
        UserError: ``new`` was not grown from ``old``: an entry has another id, or no merges lead to a piece.
    """
    settings = json.loads(new.to_json())
    old_entries, new_entries = (_entries(json.loads(tokenizer.to_json())) for tokenizer in (old, new))
    if moved := [piece for piece, number in old_entries.items() if new_entries.get(piece) != number]:
        raise UserError(
            f"{new.file} must hold every entry of {old.file} under its old number to start from that model. "
            f"{len(moved)} differ, such as {moved[0]!r}. Grow the model's own tokenizer: tokenizer.path and "
            "tokenizer.grow_to."
        )
    added = {token["content"] for token in settings["added_tokens"]}
    merges: dict[str, tuple[str, str]] = {}
    for merge in settings["model"].get("merges", ()):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.setdefault(left + right, (left, right))

    def split(piece: str) -> list[int]:
        if (number := old_entries.get(piece)) is not None:
            return [number]
        if piece not in merges:
            raise UserError(
                f"{new.file}: no merges lead to the piece {piece!r}, which {old.file} lacks: no row for it can be made."
            )
        left, right = merges[piece]
        return split(left) + split(right)

    return {
        number: old.encode(piece) if piece in added else split(piece)
        for piece, number in new_entries.items()
        if piece not in old_entries
    }


def _entries(settings: dict[str, Any]) -> dict[str, int]:
    return settings["model"]["vocab"] | {token["content"]: token["id"] for token in settings["added_tokens"]}


def grown_rows(rows: Tensor, pieces: Mapping[int, Sequence[int]], size: int) -> Tensor:
    """[V, D] -> [size, D]: the old rows, then for each new entry the mean of the rows of its ``pieces``.

    Rows that no entry uses get the mean of all old rows.
    """
    grown = rows.new_empty(size, rows.shape[1])
    grown[: len(rows)] = rows
    grown[len(rows) :] = rows.float().mean(0)
    for number, old_ids in pieces.items():
        grown[number] = rows[torch.tensor(old_ids)].float().mean(0)
    return grown
