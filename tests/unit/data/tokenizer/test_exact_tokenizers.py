"""Tests that every kind of tokenizer encodes any text exactly: no control token, nothing lost, SentencePiece's ids."""

import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Encoder
from tokenizers.models import BPE, Unigram

from moh_megatron.data.tokenizer.byte_level_bpe import train_byte_level_bpe
from moh_megatron.data.tokenizer.combining_marks import MARKED_TEXTS
from moh_megatron.data.tokenizer.grow import grow_tokenizer
from moh_megatron.data.tokenizer.names import SPACE
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_json import WHITE_SPACE
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.errors import UserError

NAMES = ("</s>", "<s>", "<unk>", "<0x41>", "<0x0A>", "<|endoftext|>", "<ctl>", "new", "<", "/", "s>", "0x41>")
WORDS = (
    "The",
    "old",
    "closes",
    "line.",
    "ing",
    "quick",
    "--",
    "é",
    "e\u0301",
    "日本",
    "☃",
    "a b",
    "ｆ",
    "½",
    "\x00",
    "🙂",
)
SYMBOLS = ("<|user|>", "Mr. Knightley", "ing")
TEXTS = st.lists(
    st.sampled_from((*NAMES, *WORDS, *WHITE_SPACE, *SYMBOLS))
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    max_size=9,
).map("".join)
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OWN = {**LLAMA, "add_dummy_prefix": False}
CONTROLS = ["<ctl>", "new"]
IMPORTED = {
    "bpe, default rules": {"model_type": "bpe", "control_symbols": CONTROLS},
    "bpe, identity": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe, nfkc": {"model_type": "bpe", "normalization_rule_name": "nfkc"},
    "bpe, like LLaMA": {"model_type": "bpe", **LLAMA, "control_symbols": CONTROLS},
    "bpe, symbols": {"model_type": "bpe", **OWN, "user_defined_symbols": ["<|user|>", "Mr.▁Knightley", "\n", "▁▁"]},
    "bpe, no bytes": {"model_type": "bpe", "byte_fallback": False, "control_symbols": CONTROLS},
    "unigram, default rules": {"model_type": "unigram", "control_symbols": CONTROLS},
    "unigram, identity": {"model_type": "unigram", "normalization_rule_name": "identity"},
    "unigram, case folding": {"model_type": "unigram", **LLAMA, "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram, symbols": {"model_type": "unigram", "user_defined_symbols": ["<|user|>", "Mr.▁Knightley", "ing"]},
    "unigram, no bytes": {"model_type": "unigram", "byte_fallback": False, "control_symbols": CONTROLS},
}
"""SentencePiece's settings; without any, it normalises by nmt_nfkc and puts a space before a text."""


class Kind(NamedTuple):
    """A tokenizer, and the SentencePiece processor that it must equal, if there is one."""

    tokenizer: Tokenizer
    reference: Any


def train(lines: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    defaults = {
        "vocab_size": 420 if options.get("byte_fallback", True) else 200,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(lines), model_writer=model, num_threads=1, **{**defaults, **options}
    )
    return model.getvalue()


def load(folder: Path, model: bytes, **tokenizer_config: Any) -> Kind:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return Kind(load_tokenizer(folder), sentencepiece.SentencePieceProcessor(model_proto=model))  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def lines(chapters: list[str]) -> list[str]:
    return [line for chapter in chapters[:6] for line in chapter.split("\n") if line]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("kinds")
    kinds = {}
    for name, symbols in (("bpe", SYMBOLS), ("unigram", SYMBOLS), ("plain", ())):
        folder = root / f"own {name}"
        train_tokenizer(
            lines,
            vocab_size=500,
            character_coverage=0.9995,
            out_dir=folder,
            model_type="bpe" if name == "bpe" else "unigram",
            user_symbols=symbols,
        )
        reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))  # pyright: ignore[reportCallIssue]
        kinds[f"own {name}"] = Kind(load_tokenizer(folder), reference)
    train_byte_level_bpe(lines, vocab_size=400, user_symbols=(*SYMBOLS[:2], " ", "\n\n"), out_dir=root / "own bytes")
    kinds["own bytes"] = Kind(load_tokenizer(root / "own bytes"), None)
    for number, (name, options) in enumerate(IMPORTED.items()):
        kinds[name] = load(root / str(number), train(lines, **options))
    # The corpus repeats the names, so that their parts would be merged.
    corpus = [" ".join(("closes </s> <s> <0x41> <unk> <|endoftext|>x", line)) for line in lines[:300]]
    for name in ("own bpe", "own bytes", "bpe, like LLaMA"):
        base = kinds[name].tokenizer
        grow_tokenizer(base, corpus, entries=base.vocab_size + 60, out_dir=root / f"grown {name}")
        kinds[f"grown {name}"] = Kind(load_tokenizer(root / f"grown {name}"), None)
    return kinds


KINDS = ("own bpe", "own unigram", "own plain", "own bytes", *IMPORTED, "grown own bpe", "grown own bytes")


def control_ids(tokenizer: Tokenizer) -> set[int]:
    added = json.loads(tokenizer.to_json())["added_tokens"]
    return {token["id"] for token in added if token["special"] and token["content"] != "<unk>"} | {
        tokenizer.eos_token_id
    }


@pytest.mark.parametrize("kind", [*KINDS, "grown bpe, like LLaMA"])
@settings(max_examples=120, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_any_text_is_encoded_exactly(kind: str, text: str, kinds: dict[str, Kind]) -> None:
    tokenizer, reference = kinds[kind]
    ids = tokenizer.encode(text)
    assert not control_ids(tokenizer) & set(ids)
    if reference is not None:
        assert ids == reference.encode(text)
        if "no bytes" not in kind:  # without them an unknown character is lost
            assert tokenizer.decode(ids) == reference.decode(ids)
    if not any(rule in kind for rule in ("default", "nfkc", "case", "no bytes", "bpe, identity", "unigram, ")):
        assert tokenizer.decode(ids) == (
            text if kind.endswith("own bytes") or kind == "own bytes" else text.replace(SPACE, " ")
        )


def test_names_of_control_pieces_in_a_text_are_characters(kinds: dict[str, Kind]) -> None:
    text = "closes <s>old</s> new"
    for name in ("own bpe", "own unigram", "own plain", "own bytes", "bpe, like LLaMA", "grown bpe, like LLaMA"):
        tokenizer = kinds[name].tokenizer
        ids = tokenizer.encode(text)
        assert not control_ids(tokenizer) & set(ids), name
        assert tokenizer.decode(ids) == text, name


def test_white_space_at_the_ends_is_sentencepieces(kinds: dict[str, Kind]) -> None:
    for name in ("bpe, identity", "unigram, identity", "bpe, nfkc"):
        tokenizer, reference = kinds[name]
        assert tokenizer.decode(tokenizer.encode("A line.\n")) == "A line.\n"
        assert tokenizer.decode(tokenizer.encode("\n")) == "\n"
        code = ["def f():\n    return 1\n\n", "\nif x:\n\tpass\n"]
        assert tokenizer.encode_batch(code) == reference.encode(code)
        # Inside a document, nothing is put before a text and its spaces stay.
        document = "It was a truth universally"
        first, second = tokenizer.encode_batch([document[:8], document[8:]], [False, True])
        assert first + second == tokenizer.encode(document)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("symbol", ["\n", "▁▁", "\u3000"])
def test_symbols_of_white_space_that_are_normalised_are_refused(
    algorithm: str, symbol: str, lines: list[str], tmp_path: Path
) -> None:
    model = train(lines, model_type=algorithm, user_defined_symbols=[symbol])
    message = (
        r"no tokenizer\.json gives the same results \('.*' gives \[.*\], and \[.*\] in SentencePiece\)\. Name "
        r"another .* Or train it again without the user symbols of white space"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path / "model", model)


def test_bpe_symbols_behind_a_space_before_the_text_are_refused_with_both_ids_and_the_remedy(
    lines: list[str], tmp_path: Path
) -> None:
    options = {**LLAMA, "model_type": "bpe", "user_defined_symbols": ["<|user|>"]}
    message = (
        r"tokenizer\.model: no tokenizer\.json gives the same results \('<\|user\|>' gives \[3\], and \[\d+, 3\] in "
        r"SentencePiece\)\. .* with its user symbols \['<\|user\|>'\] .* \(SentencePiece's add_dummy_prefix=false\)\."
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path / "refused", train(lines, **options))
    tokenizer, reference = load(tmp_path / "remedy", train(lines, **options, add_dummy_prefix=False))
    assert tokenizer.encode("<|user|>") == reference.encode("<|user|>") == [3]


def test_symbols_that_merges_would_give_are_entries_of_their_own(lines: list[str], tmp_path: Path) -> None:
    """\" the\" is written \u0120the by a byte-level BPE; t is one of its bytes; a symbol twice is one symbol."""
    train_byte_level_bpe(lines, vocab_size=400, out_dir=tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())["model"]["vocab"]
    symbols = ("ing", "t", "her", "the\n", "日本", "ing")
    assert {"ing", "t", "her"} <= merged.keys()
    train_byte_level_bpe(lines, vocab_size=400, user_symbols=symbols, out_dir=tmp_path / "symbols")
    tokenizer = load_tokenizer(tmp_path / "symbols")
    assert tokenizer.vocab_size == 400
    assert len({tuple(tokenizer.encode(symbol)) for symbol in symbols}) == 5
    for text in ("singing t", "there the\nher 日本語 thing", *lines[:20]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("xing") == [*tokenizer.encode("x"), *tokenizer.encode("ing")]
    assert control_ids(tokenizer) == {tokenizer.eos_token_id}
    for model_type in ("bpe", "unigram"):
        train_tokenizer(
            lines,
            vocab_size=420,
            character_coverage=0.9995,
            out_dir=tmp_path / model_type,
            model_type=model_type,
            user_symbols=("ing", " x", "ing", f"{SPACE}x"),
        )
        assert load_tokenizer(tmp_path / model_type).vocab_size == 420


@pytest.mark.parametrize(("symbol", "decoded"), [("naïve", "na\ufffdve"), ("é", "\ufffd"), ("Ġthe", " the")])
def test_byte_level_symbol_of_characters_that_stand_for_bytes_is_refused(
    symbol: str, decoded: str, lines: list[str], tmp_path: Path
) -> None:
    message = rf"tokenizer\.user_symbols: '{symbol}' must be decoded to itself\. Got '{decoded}'.*sentencepiece_bpe"
    with pytest.raises(UserError, match=message):
        train_byte_level_bpe(lines, vocab_size=400, user_symbols=(symbol,), out_dir=tmp_path)


def test_control_piece_of_one_character_is_refused(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'☃' gives \[\d+, 3\], and \["):
        load(tmp_path / "model", train(lines, model_type="bpe", control_symbols=["☃"]))


def test_user_symbol_with_the_name_of_a_special_token_is_refused(lines: list[str], tmp_path: Path) -> None:
    for symbol in ("", "</s>", "<unk>", "<0x41>"):
        with pytest.raises(UserError, match=rf"tokenizer\.user_symbols: {re.escape(repr(symbol))} cannot be a text"):
            train_tokenizer(lines, vocab_size=420, character_coverage=1.0, out_dir=tmp_path, user_symbols=(symbol,))
    for symbol in ("", "<|endoftext|>"):
        with pytest.raises(UserError, match=rf"tokenizer\.user_symbols: {re.escape(repr(symbol))} cannot be a text"):
            train_byte_level_bpe(lines, vocab_size=420, out_dir=tmp_path, user_symbols=(symbol,))


def test_settings_of_a_model_are_kept_when_it_grows(kinds: dict[str, Kind]) -> None:
    """A .model splits the names of special tokens without a file that says so."""
    grown, base = kinds["grown bpe, like LLaMA"].tokenizer, kinds["bpe, like LLaMA"].tokenizer
    assert grown.split_special_tokens
    assert grown.eos_token_id == base.eos_token_id == 2
    assert not (grown.folder / "tokenizer.model").exists()
    names = {token["content"] for token in json.loads(grown.to_json())["added_tokens"]} | {"<0x41>"}
    assert not [merge for merge in json.loads(grown.to_json())["model"]["merges"] if "".join(merge) in names]


def test_tokenizer_json_that_gives_special_tokens_in_spite_of_its_settings_is_refused(tmp_path: Path) -> None:
    """A Unigram finds the name of a special token like any other piece."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        ("<", -3.0),
        ("/", -3.0),
        ("s", -3.0),
        (">", -3.0),
        ("a", -3.0),
    ]
    encoder = Encoder(Unigram(pieces, unk_id=0))  # pyright: ignore[reportArgumentType]
    encoder.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("</s>", normalized=False)])
    encoder.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a</s>") == [7, 1]  # the convention of transformers and Megatron-LM
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    with pytest.raises(
        UserError, match=r"with split_special_tokens no text may .* Got \[1\] for '</s>', where 1 is '</s>'"
    ):
        load_tokenizer(tmp_path)


def test_panic_of_the_tokenizers_library_is_a_user_error(tmp_path: Path) -> None:
    encoder: Any = Encoder(BPE(vocab={"a": 0, "</s>": 1, " ": 2}, merges=[]))
    encoder.normalizer = normalizers.Strip()
    encoder.add_tokens([AddedToken(" ", normalized=True)])  # of which the normalisation leaves nothing
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match=r"tokenizer\.json: must encode every text\. Got one that it cannot"):
            encode("é a")


LETTERS = "aeoEOuAſﬁ½ẸÅêơÁάᾳαωדשبثﻻﺎｶﾊﾡかकｅ"
MARKS = (
    "\u0301\u0302\u0303\u0323\u0308\u0345\u0342\u0313\u0651\u064e\u0652\u05bc\u05b8\u05c1"
    "\u3099ﾞﾟￂ\u093c\ufe0f\u200c\u200d\U0001f3fb"
)


@pytest.mark.parametrize("rules", ["nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_letters_with_marks_are_normalised_as_in_sentencepiece(rules: str, lines: list[str], tmp_path: Path) -> None:
    tokenizer, reference = load(tmp_path / "hf", train(lines, model_type="bpe", normalization_rule_name=rules))
    assert not [text for text in MARKED_TEXTS if tokenizer.encode(text) != reference.encode(text)]
    # Whatever the marks are, none of them is lost.
    for letter in LETTERS:
        for mark in MARKS:
            for text in (f"{letter}{mark}", f"x{letter}{mark}\u0331 y"):
                found, expected = (
                    unicodedata.normalize("NFKD", side.decode(side.encode(text))) for side in (tokenizer, reference)
                )
                assert sorted(found) == sorted(expected), ascii(text)


@pytest.mark.parametrize("rules", ["nfkc", "nmt_nfkc_cf"])
def test_text_may_begin_with_a_mark(rules: str, lines: list[str], tmp_path: Path) -> None:
    """As a document may that was cut there. U+0344 and U+0F81 stand for two marks, U+0341 for another one."""
    tokenizer, reference = load(tmp_path / "hf", train(lines, model_type="bpe", normalization_rule_name=rules))
    for mark in (*MARKS, *"\u0344\u0f73\u0f75\u0f81\u0341\ufe0f\u0e31\u093f"):
        for text in (mark, f"{mark}a", f"{mark}{mark} b", f"\n{mark}", f"a{mark}"):
            assert tokenizer.encode(text) == reference.encode(text), ascii(text)


def test_model_that_normalises_letters_with_marks_in_another_way_is_announced(
    lines: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The library forgets the mark of a letter that has a rule of one's own."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("FB01\t66 69\n")
    load(tmp_path / "default", train(lines, model_type="bpe"))
    assert not caplog.records
    load(tmp_path / "own", train(lines, model_type="bpe", normalization_rule_tsv=str(rules)))
    (message,) = caplog.messages
    assert re.search(r"own/tokenizer\.model: letters with combining marks .* gives \[.*\], and \[.*\] there\.", message)


def test_rules_of_ones_own_that_compose_give_sentencepieces_ids(lines: list[str], tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(train(lines, model_type="bpe"))  # pyright: ignore[reportAttributeAccessIssue]
    model.normalizer_spec.name = "user_defined"
    tokenizer, reference = load(tmp_path / "own", model.SerializeToString())
    assert not [text for text in MARKED_TEXTS if tokenizer.encode(text) != reference.encode(text)]
