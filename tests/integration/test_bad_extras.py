"""Tokenizers and settings of generation that Transformers would not take: refused by import, and again by export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.convert import into_either_form, llama_folder, run_convert

from moh_megatron.checkpoint.hf import hf_tokenizer
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer

SETTINGS, SPECIAL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
OPENS = "hf: must hold a tokenizer that Transformers opens. It does not:"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A LLaMA whose vocabulary has exactly the tokenizer's entries."""
    folder = llama_folder(tmp_path_factory.mktemp("sound") / "hf", vocab_size=280)
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)
    return folder


def having(name: str, **values: Any) -> Callable[[Path], object]:
    """Adds fields to a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | values))

    return edit


def holding(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def added(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(number): {"content": token, "special": True, **flags}}


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "padding_beyond": (
        having(SPECIAL, pad_token="[PAD]"),
        f"{SPECIAL}: every token must be one of the model's, 0 to 279",
    ),
    "beginning_beyond": (having(SETTINGS, bos_token="<BOS>"), "Got '<BOS>', which tokenizer.json does not hold"),
    "further_beyond": (
        having(SETTINGS, additional_special_tokens=["<ä>"]),
        f"{SETTINGS}: every token must be one of the model's, 0 to 279. Got '<ä>', which",
    ),
    "added_beyond": (having(SETTINGS, added_tokens_decoder=added(280, "[X]")), "Transformers makes it token 280"),
    "added_of_no_kind": (having(SETTINGS, added_tokens_decoder={"x": 3}), OPENS),
    "extra_of_no_kind": (having(SETTINGS, extra_special_tokens="<x>"), OPENS),
    "further_of_no_kind": (having(SETTINGS, additional_special_tokens=5), OPENS),
    "otherwise_read": (
        having(SETTINGS, additional_special_tokens=["e", "o"], split_special_tokens=False),
        "tokenizer.json alone says: [",
    ),
    "length_of_no_kind": (having(SETTINGS, model_max_length="abc"), f"{SETTINGS}: model_max_length must be a number"),
    "half_a_character": (having(SETTINGS, mine="\ud800"), OPENS),
    "end_of_no_kind": (having(SETTINGS, eos_token={"x": 1}), f"{SETTINGS}: eos_token must be a token, or an object"),
    "special_tokens": (holding(SPECIAL, b"{"), f"{SPECIAL}: cannot be read as JSON"),
    "special_of_no_kind": (having(SPECIAL, eos_token=5), OPENS),
    "template": (holding("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja: must be text in UTF-8"),
    "generation": (
        having(GENERATION, max_new_tokens="x"),
        f"{GENERATION}: must hold a max_new_tokens that Transformers",
    ),
    "generation_end": (
        having(GENERATION, eos_token_id="x"),
        f"{GENERATION}: eos_token_id must be a token from 0 to 279",
    ),
    "generation_pad": (having(GENERATION, pad_token_id=280), "pad_token_id must be a token from 0 to 279. Got 280"),
}


@into_either_form
@pytest.mark.parametrize("name", BROKEN)
def test_what_transformers_would_not_take_is_refused(sound, tmp_path, capsys, name, command, source, target):
    breaks, message = BROKEN[name]
    folder = shutil.copytree(sound, tmp_path / "hf")
    breaks(folder)
    assert run_convert(command, source, folder, target, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("name", ["padding_beyond", "extra_of_no_kind", "template", "generation", "generation_pad"])
def test_a_checkpoint_that_was_imported_unchecked_is_not_exported(sound, tmp_path, capsys, monkeypatch, name):
    breaks, message = BROKEN[name]
    folder = shutil.copytree(sound, tmp_path / "hf")
    breaks(folder)
    with monkeypatch.context() as patched:
        for check in ("check_generation", "check_tokenizer"):
            patched.setattr(hf_tokenizer, check, lambda *given: None)
        assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    capsys.readouterr()
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 2
    told = capsys.readouterr().err
    assert message.replace("hf: ", "tokenizer: ") in told
    assert "Traceback" not in told
    assert not (tmp_path / "back").exists()


def test_what_transformers_takes_is_converted_quietly(sound, tmp_path, capfd):
    folder = shutil.copytree(sound, tmp_path / "hf")
    having(SPECIAL, eos_token="</s>", pad_token={"content": "</s>"})(folder)
    # temperature counts where tokens are drawn only, of which Transformers would warn.
    having(GENERATION, temperature=0.6, pad_token_id=-1, eos_token_id=[1, 2])(folder)
    # A name of our own files, which a folder of others may bear.
    (folder / "token_ids.json").write_text("garbage")
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    assert capfd.readouterr().err == ""
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / GENERATION).read_text())["temperature"] == 0.6
