"""No command runs code of a folder unasked, whatever its file is named and whatever refers to it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.convert import llama_folder, run_convert
from transformers import AutoModelForCausalLM

from moh_megatron.checkpoint.hf import transformers_io
from moh_megatron.checkpoint.hf.hf_config import AUTO_MAP, CODE
from moh_megatron.checkpoint.hf.hf_model import configuration_moh
from moh_megatron.commands import generate
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.evaluate.lm_eval_models import language_model
from moh_megatron.evaluate.loaded_model import load_model
from moh_megatron.io.errors import UserError

pytestmark = pytest.mark.usefixtures("process_groups")

SHIPPED = {name: Path(configuration_moh.__file__).with_name(name).read_text() for name in CODE}
OWN = ("tokenization_own.py", "custom_generate/generate.py")
"""Further files that transformers imports from a folder that it trusts."""
MOH = ("moh.enabled=true", "moh.router=query_norm", "moh.shared_heads=4", "moh.active_heads=6")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A LLaMA with a tokenizer."""
    folder = llama_folder(tmp_path_factory.mktemp("dense") / "hf", vocab_size=300)
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)
    return folder


@pytest.fixture(scope="module")
def exported(dense, tmp_path_factory) -> Path:
    """A MoH model as this project writes it."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert run_convert("official-to-hf", "--load-dir", dense, "--hf-dir", folder) == 0
    return folder


def change_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


def tampered(folder: Path, source: Path, ran: Path, own: tuple[str, ...] = OWN) -> Path:
    """Copy ``source``; the copy still works when it is trusted, but its code then creates the file ``ran``."""
    shutil.copytree(source, folder)
    for name in (*CODE, *own):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        code = SHIPPED.get(name, "generate = lambda **arguments: None\n")
        file.write_text(f"{code}\nopen({str(ran)!r}, 'a').close()\n")
    change_json(folder / "config.json", auto_map=AUTO_MAP | {"AutoTokenizer": ["tokenization_own.Own", None]})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    return folder


def holds_shipped_code(folder: Path) -> bool:
    return all((folder / name).read_text() == code for name, code in SHIPPED.items())


@pytest.mark.parametrize("overrides", [(), MOH], ids=["dense", "upcycled"])
def test_import_runs_no_code_of_a_llama_folder(dense, tmp_path, capsys, overrides):
    ran = tmp_path / "ran"
    folder = tampered(tmp_path / "hf", dense, ran)
    into = ("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt", "--verify")
    assert run_convert(*into, *overrides) == 0
    assert "KL divergence" in capsys.readouterr().err
    assert not ran.exists()


def test_official_to_hf_runs_no_code_of_the_folder(dense, tmp_path, capsys):
    ran = tmp_path / "ran"
    folder = tampered(tmp_path / "official", dense, ran)
    assert run_convert("official-to-hf", "--load-dir", folder, "--hf-dir", tmp_path / "hf", "--verify") == 0
    assert "KL divergence" in capsys.readouterr().err
    assert holds_shipped_code(tmp_path / "hf")
    assert not ran.exists()


def test_conversions_run_no_changed_code_of_an_export(exported, tmp_path, capsys):
    ran, checkpoint = tmp_path / "ran", tmp_path / "ckpt"
    folder = tampered(tmp_path / "hf", exported, ran)
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", checkpoint, "--verify") == 0
    assert "KL divergence" in capsys.readouterr().err
    assert not ran.exists()
    assert run_convert("official-to-hf", "--load-dir", folder, "--hf-dir", tmp_path / "other", "--verify") == 2
    assert not ran.exists()
    # Export that checkpoint to a new folder, and over an export whose code was changed.
    replaced = tampered(tmp_path / "replaced", exported, ran, own=())
    assert not holds_shipped_code(replaced)
    for out in (tmp_path / "beside", replaced):
        for form in ("official", "moh"):
            arguments = ("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", out, "--format", form, "--verify")
            assert run_convert(*arguments) == 0
            assert "KL divergence" in capsys.readouterr().err
        assert holds_shipped_code(out)
        assert not ran.exists()
    # Loading the changed folder with trust does run its code, so the test would have noticed.
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


def run_generate(*arguments: object) -> int:
    """Run moh-generate; returns its exit code."""
    settings = ("generate.max_new_tokens=2", "generate.prompts=[words]")
    with patch.object(sys, "argv", ["moh-generate", *map(str, arguments), *settings]):
        return generate.run()


@pytest.mark.parametrize("source", ["dense", "exported"])
def test_evaluation_and_generation_run_no_changed_code_of_a_known_model(source, request, tmp_path, capsys):
    ran = tmp_path / "ran"
    folder = tampered(tmp_path / "hf", request.getfixturevalue(source), ran)
    assert run_generate(folder) == 0
    assert "words" in capsys.readouterr().out
    model = language_model(load_model(folder, torch.device("cpu")), 1)
    assert type(model).__name__ == "FolderLM"
    assert not ran.exists()


@pytest.fixture
def foreign(exported, tmp_path) -> tuple[Path, Path]:
    """A folder of an architecture that nobody knows, and the file that its code creates when it runs."""
    ran, folder = tmp_path / "ran", tmp_path / "foreign"
    tampered(folder, exported, ran, own=())
    for name in (*CODE, "config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("moh_llama", "own_llama"))
    (folder / "moh_megatron.json").unlink()
    shutil.copyfile(exported / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder, ran


def test_code_of_an_unknown_model_runs_only_when_it_is_trusted(foreign, capsys):
    folder, ran = foreign
    assert run_generate("smoke", f"generate.load={folder}") == 2
    message = capsys.readouterr().err
    assert f"{folder}: must hold a model and a tokenizer that Transformers or this project knows" in message
    assert "modeling_moh.MoHForCausalLM" in message
    assert "--trust-remote-code" in message
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_model(folder, torch.device("cpu"))
    assert run_generate(folder) == 2
    assert f"moh-generate CONFIG generate.load={folder}" in capsys.readouterr().err
    assert not ran.exists()
    assert run_generate("smoke", f"generate.load={folder}", "--trust-remote-code") == 0
    assert ran.exists()


def test_code_of_an_unknown_tokenizer_is_refused_by_name(exported, tmp_path):
    ran = tmp_path / "ran"
    folder = tampered(tmp_path / "hf", exported, ran)
    change_json(folder / "tokenizer_config.json", tokenizer_class="Own")
    with pytest.raises(UserError, match=r"classes of its own: .*tokenization_own\.Own.*--trust-remote-code"):
        transformers_io.open_tokenizer(folder)
    assert not ran.exists()
