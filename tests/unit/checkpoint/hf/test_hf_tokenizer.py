"""Tests that an export puts the same special tokens around a text as the folder that was imported."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import processors
from transformers import AutoTokenizer

from moh_megatron.checkpoint.hf.hf_tokenizer import check_tokenizer, write_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.io.errors import UserError

VOCABULARY = 300
TEXT = "some words to learn"


@pytest.fixture(scope="module")
def model() -> bytes:
    """Like LLaMA-2's: <s> is 1, </s> is 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([TEXT] * 99),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def make_folder(folder: Path, model: bytes, **settings: object) -> Path:
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    return folder


def import_and_export(original: Path, root: Path) -> Path:
    """What a conversion to a checkpoint and back does with the tokenizer."""
    tokenizer = load_tokenizer(original)
    check_tokenizer(tokenizer, VOCABULARY)
    tokenizer.save(root / "checkpoint")
    (root / "export").mkdir()
    write_tokenizer(load_tokenizer(root / "checkpoint"), root / "export", VOCABULARY)
    return root / "export"


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": False, "add_eos_token": False}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>"}, [], [2]),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "</s>"}}, [2], []),
    ],
)
def test_export_puts_the_same_special_tokens_around_a_text(model, tmp_path, settings, before, after):
    original = make_folder(tmp_path / "hf", model, **settings)
    export = import_and_export(original, tmp_path)
    for folder in (original, export):
        opened = AutoTokenizer.from_pretrained(folder)
        inner = opened(TEXT, add_special_tokens=False)["input_ids"]
        assert opened(TEXT)["input_ids"] == [*before, *inner, *after]
        assert inner == load_tokenizer(export).encode(TEXT)
    assert load_tokenizer(export).encode(TEXT, add_special_tokens=True) == [*before, *inner, *after]
    pair = AutoTokenizer.from_pretrained(original)(TEXT, "learn")["input_ids"]
    assert AutoTokenizer.from_pretrained(export)(TEXT, "learn")["input_ids"] == pair


def test_template_of_tokenizer_json_is_kept(model, tmp_path):
    folder = make_folder(tmp_path / "hf", model)
    encoder = json.loads(load_tokenizer(folder).to_json())
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    encoder["post_processor"] = json.loads(template.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(encoder))
    export = import_and_export(folder, tmp_path)
    ids = [AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"] for path in (folder, export)]
    assert ids[0] == ids[1]
    assert (ids[0][0], ids[0][-1]) == (1, 2)


def test_import_refuses_special_tokens_that_an_export_would_lose(model, tmp_path):
    """special_tokens_map.json names another token than tokenizer_config.json."""
    folder = make_folder(tmp_path / "hf", model, add_bos_token=True, bos_token="<s>")
    (folder / "special_tokens_map.json").write_text('{"bos_token": "</s>"}')
    with pytest.raises(UserError, match=r"puts there: \[2\] before and \[\] after it\. Got \[1\] and \[\]"):
        check_tokenizer(load_tokenizer(folder), VOCABULARY)
