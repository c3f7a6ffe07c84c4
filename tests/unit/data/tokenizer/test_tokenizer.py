"""Tests of our SentencePiece BPE against SentencePiece and transformers, and of loading tokenizers."""

import json
import random
import re
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import models

from moh_megatron.data.tokenizer.names import SPACE
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError

AWKWARD = [
    "",
    " ",
    "     ",
    " leading",
    "trailing ",
    "two  spaces   three",
    "a\tb\t\tc",
    "line\nline\r\n\n\nline\n",
    "\x00\x01\x1f\x7f\x85",
    "naïve café Ångström",
    "e\u0301 a\u030a\u0323 \u200b\u200d\ufeff",
    "日本語のテキスト。中文,한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 🙂",
    "مرحبا שלום",
    "</s> <unk> <s> <0x0A> <|endoftext|>",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "------ ..... ....... !!!!!!!!!",
    "hahahahahahahahaha thethethethethethe",
    "\u2585\u2047\ufffd\U0010ffff",
    "1234567890 £20,000",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chapters: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(chapters, vocab_size=2048, character_coverage=0.9995, out_dir=path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore[reportCallIssue]


def samples(chapters: list[str]) -> list[str]:
    generator = random.Random(0)
    texts = list(AWKWARD)
    for chapter in chapters[::3]:
        texts += chapter.split("\n")[:6]
        start = generator.randrange(len(chapter) - 300)
        texts += [chapter[start : start + generator.randrange(300)], "".join(generator.sample(chapter[:500], 60))]
    frequent = " \n\taehlortsn.é▅日👍"
    texts += ["".join(generator.choices(frequent, k=generator.randrange(1, 40))) for _ in range(500)]
    return texts


def test_bpe_encodes_as_sentencepiece(
    chapters: list[str], tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    texts = samples(chapters)
    assert len(texts) > 1000
    expected = reference.encode(texts)  # pyright: ignore[reportAttributeAccessIssue]
    encoded = tokenizer.encode_batch(texts)
    assert encoded == expected
    assert [tokenizer.encode(text) for text in texts[:50]] == expected[:50]
    assert [tokenizer.decode(ids) for ids in encoded] == texts


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_encodes_any_text_as_sentencepiece(
    text: str, tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)  # pyright: ignore[reportAttributeAccessIssue]
    assert tokenizer.decode(ids) == text.replace(SPACE, " ")
    assert tokenizer.eos_token_id not in ids


def test_bpe_encodes_repeated_pieces_as_sentencepiece(
    tokenizer: Tokenizer, reference: sentencepiece.SentencePieceProcessor
) -> None:
    """A piece that overlaps itself shows in which order the pairs are merged."""
    pieces = [reference.id_to_piece(number).replace(SPACE, " ") for number in range(258, reference.get_piece_size())]
    texts = [piece * count + piece[:cut] for piece in pieces for count in (2, 5) for cut in range(len(piece))]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)  # pyright: ignore[reportAttributeAccessIssue]


def test_special_token_ids_and_hash(folder: Path, tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 2048
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 1
    assert (tokenizer.eod, tokenizer.pad) == (1, 1)
    assert tokenizer.decode([tokenizer.eos_token_id]) == ""
    assert tokenizer.unique_identifiers["sha256"] == tokenizer.sha256
    assert load_tokenizer(folder / "tokenizer.json").sha256 == tokenizer.sha256


def test_training_twice_gives_the_same_files(tmp_path: Path, folder: Path, chapters: list[str]) -> None:
    train_tokenizer(iter(chapters), vocab_size=2048, character_coverage=0.9995, out_dir=tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_save_writes_every_file(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in folder.iterdir()}
    assert load_tokenizer(tmp_path / "copy").sha256 == tokenizer.sha256


def test_transformers_encodes_and_decodes_the_same(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: Tokenizer, chapters: list[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [text for text in samples(chapters) if "</s>" not in text]
    ids = tokenizer.encode_batch(texts)
    assert theirs(texts)["input_ids"] == ids
    assert [theirs.decode(text_ids) for text_ids in ids] == texts
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (1, 1, 2048)


def test_vocabulary_sizes_that_the_text_cannot_give_are_refused(tmp_path: Path) -> None:
    for texts, size, message in (
        (["hello world"] * 3, 2048, r"model\.vocab_size is 2048, more than .* at most 28\d\."),
        (["hello world"], 100, r"model\.vocab_size is 100, too small .* at least 266\."),
        ([""], 300, "holds no text"),
    ):
        with pytest.raises(UserError, match=message):
            train_tokenizer(texts, vocab_size=size, character_coverage=1.0, out_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def write_tokenizer(folder: Path, vocabulary: list[str], settings: dict[str, object] | None = None) -> Path:
    words = {word: number for number, word in enumerate(vocabulary)}
    Encoder(models.WordLevel(words, unk_token=vocabulary[0])).save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_eos_token_of_other_tokenizers(tmp_path: Path) -> None:
    words = ["x", "</s>", "<|endoftext|>", "<pad>", "<end>"]
    assert load_tokenizer(write_tokenizer(tmp_path, words)).eos_token_id == 1
    assert load_tokenizer(write_tokenizer(tmp_path, words, {"eos_token": {"content": "<end>"}})).eos_token_id == 4
    loaded = load_tokenizer(write_tokenizer(tmp_path, words, {"eos_token": "<end>", "pad_token": "<pad>"}))
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.vocab_size) == (4, 3, 5)
    assert (loaded.eod, loaded.pad) == (4, 3)


def test_error_names_the_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No tokenizer at .*none: expected a tokenizer\.json"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "tokenizer.json").symlink_to("nothing")
    assert has_tokenizer(tmp_path / "linked"), "it is not passed over"
    with pytest.raises(UserError, match=r"linked/tokenizer\.json: must be a regular file\. .*a link to nothing"):
        load_tokenizer(tmp_path / "linked")
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(write_tokenizer(tmp_path, ["x"]))
    with pytest.raises(UserError, match=r"eos_token of tokenizer_config\.json is '<end>', which the vocabulary"):
        load_tokenizer(write_tokenizer(tmp_path, ["x"], {"eos_token": "<end>"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("key", ["eos_token", "pad_token"])
@pytest.mark.parametrize("token", [5, ["</s>"], {"content": 1}, {"x": 1}, False])
def test_special_token_that_is_not_text_is_refused(tmp_path: Path, key: str, token: object) -> None:
    folder = write_tokenizer(tmp_path, ["x", "</s>"], {key: token})
    message = rf"tokenizer_config\.json: {key} must be a token, or .* is one\. Got {re.escape(repr(token))}"
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def test_deeply_nested_tokenizer_config_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, ["x", "</s>"])
    (folder / "tokenizer_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read as JSON \(maximum recursion"):
        load_tokenizer(folder)
