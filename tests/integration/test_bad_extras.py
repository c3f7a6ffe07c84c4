"""Tokenizers and generation settings that Transformers does not open: import refuses them, and so does export."""

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
    """A valid LLaMA whose vocabulary has exactly the tokenizer's entries."""
    folder = llama_folder(tmp_path_factory.mktemp("sound") / "hf", vocab_size=280)
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)
    return folder


def with_fields(name: str, **values: Any) -> Callable[[Path], object]:
    """Return an edit that sets fields of a JSON file."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(content | values))

    return edit


def with_content(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def added(token_id: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(token_id): {"content": token, "special": True, **flags}}


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pad_token_beyond_vocabulary": (
        with_fields(SPECIAL, pad_token="[PAD]"),
        f"{SPECIAL}: every token must be one of the model's, 0 to 279",
    ),
    "bos_token_beyond_vocabulary": (
        with_fields(SETTINGS, bos_token="<BOS>"),
        "Got '<BOS>', which tokenizer.json does not hold",
    ),
    "additional_token_beyond_vocabulary": (
        with_fields(SETTINGS, additional_special_tokens=["<ä>"]),
        f"{SETTINGS}: every token must be one of the model's, 0 to 279. Got '<ä>', which",
    ),
    "added_token_beyond_vocabulary": (
        with_fields(SETTINGS, added_tokens_decoder=added(280, "[X]")),
        "Transformers makes it token 280",
    ),
    "added_of_wrong_type": (with_fields(SETTINGS, added_tokens_decoder={"x": 3}), OPENS),
    "extra_of_wrong_type": (with_fields(SETTINGS, extra_special_tokens="<x>"), OPENS),
    "further_of_wrong_type": (with_fields(SETTINGS, additional_special_tokens=5), OPENS),
    "other_encoding": (
        with_fields(SETTINGS, additional_special_tokens=["e", "o"], split_special_tokens=False),
        "tokenizer.json alone says: [",
    ),
    "length_of_wrong_type": (
        with_fields(SETTINGS, model_max_length="abc"),
        f"{SETTINGS}: model_max_length must be a number",
    ),
    "half_a_surrogate_pair": (with_fields(SETTINGS, mine="\ud800"), OPENS),
    "eos_token_of_wrong_type": (
        with_fields(SETTINGS, eos_token={"x": 1}),
        f"{SETTINGS}: eos_token must be a token, or an object",
    ),
    "special_tokens": (with_content(SPECIAL, b"{"), f"{SPECIAL}: cannot be read as JSON"),
    "special_of_wrong_type": (with_fields(SPECIAL, eos_token=5), OPENS),
    "template": (with_content("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja: must be text in UTF-8"),
    "generation": (
        with_fields(GENERATION, max_new_tokens="x"),
        f"{GENERATION}: must hold a max_new_tokens that Transformers",
    ),
    "generation_eos": (
        with_fields(GENERATION, eos_token_id="x"),
        f"{GENERATION}: eos_token_id must be a token from 0 to 279",
    ),
    "generation_pad": (
        with_fields(GENERATION, pad_token_id=280),
        "pad_token_id must be a token from 0 to 279. Got 280",
    ),
}


@into_either_form
@pytest.mark.parametrize("name", BROKEN)
def test_extras_that_transformers_does_not_open_are_refused(sound, tmp_path, capsys, name, command, source, target):
    breaks, message = BROKEN[name]
    folder = shutil.copytree(sound, tmp_path / "hf")
    breaks(folder)
    assert run_convert(command, source, folder, target, tmp_path / "out") == 2
    messages = capsys.readouterr().err
    assert message in messages
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    "name", ["pad_token_beyond_vocabulary", "extra_of_wrong_type", "template", "generation", "generation_pad"]
)
def test_export_refuses_extras_that_the_import_did_not_check(sound, tmp_path, capsys, monkeypatch, name):
    breaks, message = BROKEN[name]
    folder = shutil.copytree(sound, tmp_path / "hf")
    breaks(folder)
    with monkeypatch.context() as patched:
        for check in ("check_generation", "check_tokenizer"):
            patched.setattr(hf_tokenizer, check, lambda *arguments: None)
        assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    capsys.readouterr()
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 2
    messages = capsys.readouterr().err
    assert message.replace("hf: ", "tokenizer: ") in messages
    assert "Traceback" not in messages
    assert not (tmp_path / "back").exists()


def test_valid_extras_are_converted_without_any_complaint(sound, tmp_path, capfd):
    folder = shutil.copytree(sound, tmp_path / "hf")
    with_fields(SPECIAL, eos_token="</s>", pad_token={"content": "</s>"})(folder)
    # Transformers would warn that temperature has no effect unless tokens are sampled.
    with_fields(GENERATION, temperature=0.6, pad_token_id=-1, eos_token_id=[1, 2])(folder)
    # A folder of others may contain a file with the name of one of ours.
    (folder / "token_ids.json").write_text("garbage")
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    assert capfd.readouterr().err == "loading PyTorch\n"
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / GENERATION).read_text())["temperature"] == 0.6
