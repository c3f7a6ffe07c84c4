"""Tests of Unigram, byte-level BPE, user symbols, SentencePiece .model files, and grown vocabularies."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from transformers import AutoTokenizer

from moh_megatron.config.schema import Config
from moh_megatron.data.prepare.pipeline import prepare, prepare_tokenizer
from moh_megatron.data.tokenizer.byte_level_bpe import train_byte_level_bpe
from moh_megatron.data.tokenizer.grow import grow_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_json import PROBES, to_tokenizer_json
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError

MakeConfig = Callable[..., Config]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SYMBOLS = ("<|user|>", "Mr. Knightley", "\n\n")


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory, chapters: list[str]) -> tuple[Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("unigram")
    train_tokenizer(
        chapters[:60],
        vocab_size=1200,
        character_coverage=0.9995,
        out_dir=folder,
        model_type="unigram",
        user_symbols=SYMBOLS[:2],
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore[reportCallIssue]
    return load_tokenizer(folder), reference


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory, chapters: list[str]) -> Tokenizer:
    folder = tmp_path_factory.mktemp("byte_level")
    train_byte_level_bpe(chapters[:60], vocab_size=1200, user_symbols=SYMBOLS, out_dir=folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def without_pre_tokenizer(tmp_path_factory: pytest.TempPathFactory, chapters: list[str]) -> tuple[Tokenizer, Encoder]:
    """Like LLaMA-2's tokenizer: no pre-tokenizer, pieces of several spaces, a space before every text.

    As we load it, and as the library does, which splits nothing.
    """
    folder = tmp_path_factory.mktemp("without_pre_tokenizer")
    lines = [line for chapter in chapters[:60] for line in chapter.split("\n")] + [
        "        return x",
        "    if x:",
    ] * 500
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    settings = json.loads(to_tokenizer_json(model.getvalue()).to_str())
    settings["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    unsplit: Any = Encoder.from_file(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), unsplit


def test_unigram_encodes_as_sentencepiece(chapters: list[str], unigram: tuple[Tokenizer, Any]) -> None:
    tokenizer, reference = unigram
    paragraphs = [paragraph for chapter in chapters[::9] for paragraph in chapter.split("\n")]
    texts = [*PROBES, *paragraphs, "so<|user|>: Mr. Knightley, Mr. Knightleys  Mr.  Knightley"]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


@given(text=TEXT)
def test_unigram_encodes_any_text_as_sentencepiece(text: str, unigram: tuple[Tokenizer, Any]) -> None:
    assert unigram[0].encode(text) == unigram[1].encode(text)


@given(text=TEXT)
def test_byte_level_decodes_any_text_to_itself(text: str, byte_level: Tokenizer) -> None:
    assert byte_level.decode(byte_level.encode(text)) == text


def test_byte_level_entries_and_symbols(byte_level: Tokenizer, chapters: list[str], tmp_path: Path) -> None:
    assert byte_level.vocab_size == 1200
    assert byte_level.decode([byte_level.eos_token_id]) == ""
    symbols = [byte_level.encode(symbol) for symbol in SYMBOLS]
    assert all(len(ids) == 1 for ids in symbols)
    assert byte_level.encode("<|endoftext|>") != [byte_level.eos_token_id]
    train_byte_level_bpe(chapters[:60], vocab_size=1200, user_symbols=SYMBOLS, out_dir=tmp_path)
    assert load_tokenizer(tmp_path).sha256 == byte_level.sha256
    with pytest.raises(UserError, match=r"model\.vocab_size is 5000, more than the text .* it gives \d+"):
        train_byte_level_bpe(["hello world"] * 9, vocab_size=5000, out_dir=tmp_path / "more")
    with pytest.raises(UserError, match=r"model\.vocab_size is 100, too small"):
        train_byte_level_bpe(["hello world"] * 9, vocab_size=100, out_dir=tmp_path / "less")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("like_llama", [True, False])
def test_sentencepiece_model_is_loaded_with_the_same_ids(
    kind: str, like_llama: bool, chapters: list[str], tmp_path: Path
) -> None:
    """With the settings of LLaMA-2, and with SentencePiece's defaults: NFKC, and single spaces only."""
    llama_settings = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }
    model = io.BytesIO()
    lines = [line for chapter in chapters[:60] for line in chapter.split("\n")]
    lines += ["        return x", "    if x:", "  a   b"] * 500
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=kind,
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
        **(llama_settings if like_llama else {}),
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(path)
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))  # pyright: ignore[reportCallIssue]
    assert tokenizer.eos_token_id == reference.eos_id() == 2
    texts = [*lines[::7], *lines[-3:], *chapters[60:64], *PROBES]
    assert tokenizer.encode_batch(texts) == reference.encode(texts)
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.sha256, again.eos_token_id) == (tokenizer.sha256, tokenizer.eos_token_id)
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == model.getvalue()
    # A text inside a document gets no space before it: the tokens of its chunks are those of the document.
    document = "It was a truth universally acknowledged, that a single man"
    cut = document.index(" a single")
    first, second = tokenizer.encode_batch([document[:cut], document[cut:]], [False, True])
    assert first + second == tokenizer.encode(document)


@given(text=TEXT | st.text(st.sampled_from("  \u2581aehn.\n日<"), max_size=60))
def test_bpe_without_pre_tokenizer_is_split_at_spaces_with_the_same_tokens(
    text: str, without_pre_tokenizer: tuple[Tokenizer, Encoder]
) -> None:
    tokenizer, unsplit = without_pre_tokenizer
    assert unsplit.pre_tokenizer is None
    assert tokenizer.encode(text) == unsplit.encode(text, add_special_tokens=False).ids


def test_long_document_has_the_same_tokens_as_without_splitting(
    without_pre_tokenizer: tuple[Tokenizer, Encoder], chapters: list[str]
) -> None:
    text = "\n".join(chapters[:30])
    assert without_pre_tokenizer[0].encode(text) == without_pre_tokenizer[1].encode(text, add_special_tokens=False).ids
    assert 'pre_tokenizer": null' in without_pre_tokenizer[0].to_json()


def test_tokenizer_config_decides_how_the_name_of_a_special_token_is_encoded(
    byte_level: Tokenizer, chapters: list[str], tmp_path: Path
) -> None:
    byte_level.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("split_special_tokens") is True
    file.write_text(json.dumps(settings))
    not_splitting = load_tokenizer(tmp_path)
    text = "It ends <|endoftext|> here"
    assert byte_level.eos_token_id not in byte_level.encode(text)
    for folder, tokenizer in ((tmp_path, not_splitting), (byte_level.folder, byte_level)):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert not_splitting.encode(text).count(not_splitting.eos_token_id) == 1
    assert not_splitting.encode_batch(chapters[:9]) == byte_level.encode_batch(chapters[:9])


def test_error_names_the_broken_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"tokenizer\.model: no tokenizer\.json gives the same results \(SentencePiece"):
        load_tokenizer(tmp_path)


def test_grown_vocabulary_keeps_every_id(byte_level: Tokenizer, chapters: list[str], tmp_path: Path) -> None:
    train_tokenizer(chapters[:60], vocab_size=900, character_coverage=0.9995, out_dir=tmp_path / "pieces")
    chinese = ["北京大学的学生在北京学习中文,他们喜欢北京大学。", "学习中文很有意思,北京的中文老师很好。"] * 50
    for base in (byte_level, load_tokenizer(tmp_path / "pieces")):
        folder = tmp_path / f"grown{base.vocab_size}"
        entries = base.vocab_size + 120
        grow_tokenizer(base, [*chinese, *chapters[60:90]], entries=entries, out_dir=folder)
        grown = load_tokenizer(folder)
        assert (grown.vocab_size, grown.eos_token_id) == (entries, base.eos_token_id)
        before, after = (json.loads(tokenizer.to_json())["model"]["vocab"] for tokenizer in (base, grown))
        assert before.items() <= after.items()
        assert sorted(number for number in after.values() if number >= base.vocab_size) == list(
            range(base.vocab_size, entries)
        )
        texts = [*chapters[60:90], *chinese, *PROBES]
        encoded = grown.encode_batch(texts)
        assert [grown.decode(ids) for ids in encoded] == texts
        assert sum(map(len, encoded)) < 0.97 * sum(map(len, base.encode_batch(texts)))
        used = {token for ids in encoded for token in ids if token >= base.vocab_size}
        assert len(used) > 40  # the others are merged into longer ones
        with pytest.raises(UserError, match=r"tokenizer\.grow_to is 9000, more than .* at most \d+"):
            grow_tokenizer(base, chinese, entries=9000, out_dir=tmp_path / "none")
    with pytest.raises(UserError, match=r"must be above the 900 entries"):
        grow_tokenizer(load_tokenizer(tmp_path / "pieces"), chinese, entries=900, out_dir=tmp_path / "none")


def test_prepare_makes_the_configured_tokenizer(make_config: MakeConfig, corpus: Path, tmp_path: Path) -> None:
    config = make_config([corpus], tokenizer={"algorithm": "byte_level_bpe", "user_symbols": ("Mr.",)})
    made = prepare_tokenizer(config, tmp_path / "made")
    assert prepare(config).tokenizer.sha256 == made.sha256
    with pytest.raises(UserError, match=r"--tokenizer: .*made exists already"):
        prepare_tokenizer(config, tmp_path / "made")
    growing = make_config([corpus], vocab_size=450, tokenizer={"path": str(tmp_path / "made"), "grow_to": 440})
    assert prepare(growing).tokenizer.entries == 440
