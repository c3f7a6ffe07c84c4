"""New embedding rows of a grown vocabulary."""

from __future__ import annotations

import json

import pytest
import torch

from moh_megatron.data.tokenizer.grow import grow_tokenizer
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.vocabulary import grown_rows, new_pieces

TEXTS = ["the cat sat on the mat and the cat sat on the hat"] * 30


def bpe(folder, merges, added=()) -> Tokenizer:
    characters = sorted(set("".join(TEXTS).replace(" ", "")) | {"\u2581"})
    vocab = {piece: number for number, piece in enumerate([*characters, *("".join(merge) for merge in merges)])}
    special = [{"id": len(vocab) + n, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for n, content in enumerate(["</s>", *added])]  # fmt: skip
    settings = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "post_processor": None,
        "normalizer": None, "decoder": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(merge) for merge in merges], "byte_fallback": False},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture
def old(tmp_path):
    return bpe(tmp_path / "old", [("t", "h"), ("a", "t")])


def test_each_new_piece_splits_into_the_old_tokens_of_its_text(old, tmp_path):
    grow_tokenizer(old, TEXTS, entries=old.vocab_size + 8, out_dir=tmp_path / "new")
    new = load_tokenizer(tmp_path / "new")
    pieces = new_pieces(old, new)
    assert sorted(pieces) == list(range(old.vocab_size, new.vocab_size))
    for text in ("the", "sat on the mat", "hat"):
        split = [part for token in new.encode(text) for part in pieces.get(token, [token])]
        assert split == old.encode(text)
    assert any(len(parts) > 2 for parts in pieces.values())


def test_rows_are_means_of_the_pieces(old, tmp_path):
    grow_tokenizer(old, TEXTS, entries=old.vocab_size + 4, out_dir=tmp_path / "new")
    pieces = new_pieces(old, load_tokenizer(tmp_path / "new"))
    rows = torch.randn(old.vocab_size, 6, generator=torch.Generator().manual_seed(1))
    grown = grown_rows(rows, pieces, old.vocab_size + 6)
    assert torch.equal(grown[: old.vocab_size], rows)
    for number, parts in pieces.items():
        torch.testing.assert_close(grown[number], torch.stack([rows[part] for part in parts]).mean(0))
    torch.testing.assert_close(grown[-2:], rows.mean(0).expand(2, -1))
    half = grown_rows(rows.bfloat16(), pieces, old.vocab_size + 6)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), grown, rtol=0.01, atol=0.01)


def test_an_added_token_splits_as_its_text_was_encoded(old, tmp_path):
    more = bpe(tmp_path / "more", [("t", "h"), ("a", "t")], added=["that"])
    assert new_pieces(old, more) == {more.vocab_size - 1: old.encode("that")}


def test_a_tokenizer_with_other_ids_is_refused(old, tmp_path):
    other = bpe(tmp_path / "other", [("a", "t"), ("t", "h")])
    with pytest.raises(UserError, match="under its old number"):
        new_pieces(old, other)


def test_a_piece_without_merges_is_refused(old, tmp_path):
    settings = json.loads(old.to_json())
    settings["model"]["vocab"]["mat"] = old.vocab_size
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(UserError, match="no merges lead to the piece 'mat'"):
        new_pieces(old, load_tokenizer(tmp_path / "new"))
