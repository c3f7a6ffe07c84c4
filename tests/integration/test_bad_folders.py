"""moh-convert with broken or foreign folders: exit code 2, tensor or field named, nothing left."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.convert import into_either_form, llama_folder, run_convert

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_folder import MARKER
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    return llama_folder(tmp_path / "hf")


def sharded(folder: Path) -> dict[str, Any]:
    """Split the weights into two files with an index; returns the index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, contained in parts.items():
        save_file({name: tensors[name] for name in contained}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, contained in parts.items() for name in contained}}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        content = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return edit


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "b.safetensors").unlink()


def wrong_shard(folder: Path) -> None:
    index = sharded(folder)
    index["weight_map"]["model.norm.weight"] = "a.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    index = sharded(folder)
    contained = {name: tensors[name] for name, file in index["weight_map"].items() if file == "b.safetensors"}
    # The two files disagree, so the result would depend on the reader.
    contained["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    save_file(contained, folder / "b.safetensors", {"format": "pt"})


def pickled_shard(folder: Path) -> None:
    index = sharded(folder)
    torch.save(load_file(folder / "b.safetensors"), folder / "b.bin")
    index["weight_map"] = {name: file.replace("b.safetensors", "b.bin") for name, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def outside(folder: Path) -> None:
    index = sharded(folder)
    index["weight_map"]["model.norm.weight"] = "../a.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def overlong_name(folder: Path) -> None:
    index = sharded(folder)
    index["weight_map"]["model.norm.weight"] = "a" * 5000
    (folder / INDEX).write_text(json.dumps(index))


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def cut(at: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:at])

    return edit


def no_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 12) + b"not a header" + bytes(99))


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"][3, 4] = torch.inf


def short(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(16, 64)


def mixed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"] = tensors["model.layers.1.self_attn.v_proj.weight"].bfloat16()


def quantised(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(32, 64, dtype=torch.int8)


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].long()


def infinite_in_a_shard(folder: Path) -> None:
    edit_weights(infinite)(folder)
    sharded(folder)


def other_head(folder: Path) -> None:
    edit_config(tie_word_embeddings=True)(folder)


def head_of_another_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()


def other_head_dtype(folder: Path) -> None:
    edit_weights(head_of_another_dtype)(folder)
    edit_config(tie_word_embeddings=True)(folder)


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))


def a_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    shutil.rmtree(folder)
    folder.write_bytes(content)


def a_run(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "config.yaml").touch()
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").touch()


def small_vocabulary(folder: Path) -> None:
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def scaling(kind: str, **more: float) -> Callable[[Path], None]:
    return edit_config(rope_parameters={"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more})


def deep(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text('{"a":' * 100_000)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing_shard": (missing_shard, "b.safetensors: missing; model.safetensors.index.json says it holds"),
    "tensor_not_in_its_shard": (wrong_shard, "a.safetensors: holds no model.norm.weight, though"),
    "tensor_in_two_shards": (in_two_shards, "b.safetensors: holds lm_head.weight, as "),
    "index_leads_outside": (outside, "model.norm.weight must lie in a file of this folder. Got '../a.safetensors'"),
    "index_names_impossible_file": (overlong_name, "aaa: missing; model.safetensors.index.json says it holds model.n"),
    "deep_config": (deep("config.json"), "config.json: cannot be read as JSON (maximum recursion"),
    "deep_generation": (deep("generation_config.json"), "generation_config.json: cannot be read as JSON (maximum rec"),
    "no_weights": (no_weights, "holds no weights. Expected model.safetensors"),
    "cut_short": (cut(-300), "cut short: model.layers.1.self_attn.v_proj.weight ends at byte"),
    "cut_in_the_header": (cut(100), "with no whole header: cut short"),
    "empty": (cut(0), "Got 0 bytes with no whole header"),
    "no_header": (no_header, "the header is no safetensors header"),
    "shape": (edit_weights(short), "model.layers.1.self_attn.v_proj.weight must have shape [32, 64]. Got [16, 64]"),
    "hidden_size": (
        edit_config(hidden_size=128),
        "model.embed_tokens.weight must have shape [131, 128]",
    ),
    "layers_too_few": (edit_config(num_hidden_layers=1), "unexpected tensors: model.layers.1."),
    "layers_too_many": (edit_config(num_hidden_layers=3), "missing tensors: model.layers.2."),
    "whole_numbers": (
        edit_weights(whole_numbers),
        "model.safetensors: model.norm.weight must be of F32, F16 or BF16. Got torch.int64",
    ),
    "inf_in_a_shard": (infinite_in_a_shard, "b.safetensors: model.layers.0.self_attn.k_proj.weight: every value"),
    "nan": (edit_weights(nan), "model.layers.1.mlp.up_proj.weight: every value must be finite"),
    "inf": (edit_weights(infinite), "model.layers.0.self_attn.k_proj.weight: every value must be finite"),
    "mixed": (
        edit_weights(mixed),
        "must have the same dtype. Got model.layers.1.self_attn.q_proj.weight",
    ),
    "quantised": (edit_weights(quantised), "model.layers.1.self_attn.v_proj.weight must be of F32"),
    "index_names_a_pickle": (pickled_shard, "b.bin: the weights are pickles, which can run code"),
    "tied_of_two_dtypes": (other_head_dtype, "lm_head.weight differs from model.embed_tokens.weight"),
    "a_file": (a_file, "hf: a file. Expected the folder of a Hugging Face model."),
    "a_run": (
        a_run,
        "index.json and its files. Got a run or a checkpoint: its export is",
    ),
    "no_folder": (no_folder, "hf: no such folder"),
    "no_token": (edit_config(eos_token_id=[2, 131]), "eos_token_id must be a token from 0 to 130. Got [2, 131]"),
    "generation": (lambda folder: (folder / "generation_config.json").write_text("{"), "cannot be read as JSON"),
    "tied_but_different": (other_head, "lm_head.weight differs from model.embed_tokens.weight"),
    "architecture": (edit_config(model_type="mistral", architectures=["MistralForCausalLM"]), "Got 'mistral'"),
    "no_architecture": (edit_config(model_type=..., architectures=...), "model_type must be llama or moh_llama"),
    "biases": (edit_config(attention_bias=True), "attention_bias must be False; no other is supported. Got True"),
    "activation": (edit_config(hidden_act="gelu"), "hidden_act must be 'silu'"),
    "quantisation": (edit_config(quantization_config={"bits": 4}), "quantization_config must be None"),
    "field_missing": (edit_config(hidden_size=...), "config.json: hidden_size is missing"),
    "field_wrong": (edit_config(num_hidden_layers="2"), "num_hidden_layers must be a whole number above 0. Got '2'"),
    "heads": (edit_config(num_key_value_heads=3), "model.num_query_groups must divide model.num_attention_heads (8)"),
    "field_true": (edit_config(num_hidden_layers=True), "num_hidden_layers must be a whole number above 0. Got True"),
    "hidden_size_too_large": (
        edit_config(hidden_size=1e30),
        "hidden_size must be a whole number below 2147483648",
    ),
    "rope_theta_too_large": (
        edit_config(rope_parameters=None, rope_theta=10**400),
        "rope_theta must be a number below 2147483648. Got 1000",
    ),
    "rope_theta_stated_twice": (
        edit_config(rope_theta=5e5),
        "config.json: says RoPE in two ways that differ: rope_theta 500000.0, rope_parameters {",
    ),
    "rope_scaling_stated_twice": (
        edit_config(rope_scaling={"type": "linear", "factor": 2.0}),
        "says RoPE in two ways that differ: rope_scaling {'type': 'linear', 'factor': 2.0}, rope_parameters",
    ),
    "yarn": (scaling("yarn"), "must be of type default, linear, llama3 over whole heads. Got rope_type 'yarn'"),
    "half_llama3": (scaling("llama3"), "low_freq_factor is missing"),
    "partial": (scaling("linear", partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "tokenizer": (small_vocabulary, "the tokenizer must have at most vocab_size (131) entries. Got 280"),
    "pickle": (pickled, "pytorch_model.bin: the weights are pickles, which can run code"),
}


@into_either_form
@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_refused_and_nothing_left(folder, tmp_path, capsys, name, command, source, target):
    breaks, message = BROKEN[name]
    breaks(folder)
    assert run_convert(command, source, folder, target, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["moved" if name == "no_folder" else "hf"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], "parallel.tensor must divide model.num_attention_heads (8)"),
        (["model.hidden_size=32"], "model.hidden_size: 64 in config.json, 32 in the configuration"),
        (["model.rotary_base=1e6"], "model.rotary_base: 10000.0 in config.json, 1000000.0 in the configuration"),
        (["model.num_query_groups="], "model.num_query_groups: 4 in config.json, 8 in the configuration"),
        (["moh.enabled=true"], "moh.shared_heads is required unless moh.enabled is false"),
        (["moh.enabled=true", "moh.shared_heads=4", "moh.active_heads=9"], "moh.active_heads must be greater than"),
        (["moh.active_heads=6", "moh.router=query_norm"], "moh.active_heads, moh.router would be ignored. Add moh.en"),
        (["moh.gatin=paper"], "moh.gatin: unknown key; did you mean 'gating'?"),
    ],
)
def test_import_refuses_configuration_that_does_not_fit(folder, tmp_path, capsys, overrides, message):
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt", *overrides) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_allow_pickle_reads_tensors_and_runs_no_code(folder, tmp_path, capsys):
    arguments = ("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt", "--allow-pickle")
    expected = load_file(folder / WEIGHTS)
    pickled(folder)
    assert run_convert(*arguments) == 0
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    capsys.readouterr()
    assert run_convert(*arguments[:-2], tmp_path / "other", "--allow-pickle") == 2
    assert "cannot be read as tensors saved by torch" in capsys.readouterr().err
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    assert run_convert(*arguments[:-2], tmp_path / "other", "--allow-pickle") == 2
    assert "cannot be read as tensors saved by torch" in capsys.readouterr().err
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert run_convert(*arguments[:-2], tmp_path / "other", "--allow-pickle") == 2
    assert "Fetch it again, or save it as safetensors." in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("metadata", [None, "x"])
def test_verify_refuses_index_that_transformers_cannot_read(folder, tmp_path, capsys, metadata):
    index = sharded(folder)
    (folder / INDEX).write_text(json.dumps(index if metadata is None else index | {"metadata": metadata}))
    arguments = ("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt")
    assert run_convert(*arguments, "--verify") == 2
    messages = capsys.readouterr().err
    assert "index.json: metadata must be an object where Transformers opens the model too" in messages
    assert f"Got {metadata!r}" in messages
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert run_convert(*arguments) == 0


def test_import_refuses_folder_that_is_not_empty(folder, tmp_path, capsys):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "thesis.tex").write_text("mine")
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix == ".tex") == ["thesis.tex"]


def test_export_refuses_damaged_checkpoint(folder, tmp_path, capsys):
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    (file,) = (tmp_path / "ckpt" / "weights").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 2
    assert "does not have the content it was saved with" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_import_refuses_tokenizer_with_far_fewer_entries_than_the_vocabulary(tmp_path, capsys):
    near, far = (llama_folder(tmp_path / name, vocab_size=entries) for name, entries in (("near", 300), ("far", 1400)))
    for folder in (near, far):
        small_vocabulary(folder)
    assert run_convert("hf-to-megatron", "--hf-dir", near, "--save-dir", tmp_path / "near_ckpt") == 0
    into = ("hf-to-megatron", "--hf-dir", far, "--save-dir", tmp_path / "far_ckpt")
    assert run_convert(*into) == 2
    messages = capsys.readouterr().err
    assert "tokenizer.json: the tokenizer must have about vocab_size (1400) entries, at most 1024 fewer" in messages
    assert "Got 280" in messages
    assert not (tmp_path / "far_ckpt").exists()
    # An export of this project may have such a vocabulary.
    (far / MARKER).write_text("{}")
    assert run_convert(*into) == 0


def test_configuration_file_adds_to_config_json_and_must_not_contradict_it(folder, tmp_path, capsys):
    file, arguments = tmp_path / "made.yaml", ("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt")
    file.write_text(
        "train:\n  sequence_length: 77\nmodel:\n  hidden_size: 32\nparallel:\n  tensor: 2\n"
        "moh:\n  enabled: false\n  active_heads: 6\n"
    )
    assert run_convert(*arguments, "--config", file) == 2
    messages = capsys.readouterr().err
    assert "model.hidden_size: 64 in config.json, 32 in the configuration" in messages
    assert "model.kv_channels" not in messages, "it was not stated"
    assert run_convert(*arguments, "--config", file, "model.hidden_size=64") == 0
    config = layout.read_config(tmp_path / "ckpt")
    assert (config.train.sequence_length, config.parallel.tensor, config.model.vocab_padding) == (77, 2, 1)
