"""The weights and outputs of the official MoH-LLaMA survive every conversion."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.convert import llama_folder, run_convert
from transformers import AutoModelForCausalLM

from moh_megatron.checkpoint import layout, mapping
from moh_megatron.model.build import moh_layers
from moh_megatron.model.single import build_single_process, logits

GOLDEN = Path(__file__).parents[1] / "golden" / "official"
MOH = ("moh.enabled=true", "moh.router=query_norm", "moh.shared_heads=4", "moh.active_heads=6")


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "llama_A.vectors.safetensors")


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    content = json.loads((GOLDEN / "llama_A.config.json").read_text())
    return {key: value for key, value in content.items() if not key.startswith("_")}


@pytest.fixture(scope="module")
def official(tmp_path_factory, settings) -> Path:
    """The official model as a folder, with its weights in fp32, the precision its outputs were computed in."""
    folder = tmp_path_factory.mktemp("official")
    weights = {name: tensor.float() for name, tensor in load_file(GOLDEN / "llama_A.weights.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def checkpoint(request, official, process_groups, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "ckpt"
    tensor = f"parallel.tensor={request.param}"
    assert run_convert("hf-to-megatron", "--hf-dir", official, *MOH, "--save-dir", folder, "--verify", tensor) == 0
    return folder


def check_hf(folder: Path, vectors: dict[str, torch.Tensor], *, trust: bool = True) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, dtype=torch.float32).eval()
    masks = []
    for layer in model.model.layers:
        layer.self_attn.router.register_forward_hook(lambda _module, _inputs, gates: masks.append(gates))
    with torch.no_grad():
        got = model(vectors["input_ids"]).logits
    assert (got - vectors["logits"]).abs().max() < 2e-4
    assert torch.equal(torch.stack(masks), vectors["head_masks"].float())
    prompt = vectors["gen_prompt"]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert torch.equal(generated, vectors["gen_sequences"])


def test_import_computes_official_logits_and_head_masks(checkpoint, vectors):
    config = layout.read_config(checkpoint)
    assert config.moh.enabled
    model = build_single_process(config, layout.read_weights(checkpoint))
    masks = []
    for layer in moh_layers(model):
        layer.router.register_forward_hook(lambda _module, _inputs, routing: masks.append(routing.active))
    got = logits(model, vectors["input_ids"])
    assert (got - vectors["logits"]).abs().max() < 2e-4
    assert torch.equal(torch.stack(masks).transpose(1, 2), vectors["head_masks"].bool())
    tokens = vectors["gen_prompt"]
    for _ in range(16):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(tokens, vectors["gen_sequences"])


def test_export_of_official_model_computes_official_logits_and_head_masks(checkpoint, vectors, tmp_path, capsys):
    assert (
        run_convert("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", tmp_path / "hf", "--verify", "--json") == 0
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["hf_max_logit_diff"] < 1e-4
    assert "layer 1: largest difference" in captured.err
    assert "KL divergence" in captured.err
    check_hf(tmp_path / "hf", vectors)


def test_official_export_has_official_names_shapes_and_settings(checkpoint, official, settings, tmp_path):
    target = tmp_path / "official"
    arguments = ("--load-dir", checkpoint, "--hf-dir", target, "--format", "official")
    assert run_convert("megatron-to-hf", *arguments) == 0
    written, expected = load_file(target / "model.safetensors"), load_file(official / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert json.loads((target / "config.json").read_text()) == settings
    assert not list(target.glob("*.py"))


def test_export_records_its_form_and_the_wrong_command_refuses_it(checkpoint, official, tmp_path, capsys):
    exported = ("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", tmp_path / "official", "--format", "official")
    assert run_convert(*exported) == 0
    assert run_convert("hf-to-megatron", "--hf-dir", tmp_path / "official", "--save-dir", tmp_path / "moh") == 2
    assert "Got an export of --format official, which would be read as a dense model" in capsys.readouterr().err
    assert not (tmp_path / "moh").exists()
    assert run_convert("hf-to-megatron", "--hf-dir", official, "--save-dir", tmp_path / "dense") == 0
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "dense", "--hf-dir", tmp_path / "llama") == 0
    assert run_convert("official-to-hf", "--load-dir", tmp_path / "llama", "--hf-dir", tmp_path / "back") == 2
    assert "Got an export of --format moh of a dense model; use hf-to-megatron" in capsys.readouterr().err
    assert run_convert("official-to-hf", "--load-dir", tmp_path / "official", "--hf-dir", tmp_path / "back") == 0


def test_official_to_hf_converts_and_its_result_is_imported(official, vectors, tmp_path, capsys, caplog, monkeypatch):
    folder = tmp_path / "no identifier"
    arguments = ("official-to-hf", "--load-dir", official, "--hf-dir", folder, "--verify", "--json")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert run_convert(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.count("has no tokenizer") == 1
    assert "the first 4 of 8 heads shared, 6 active" in captured.err
    assert "KL divergence" in captured.err
    assert "Loading weights" not in captured.err
    assert "not a valid Python identifier" not in caplog.text
    assert json.loads(captured.out.splitlines()[-1])["hf_max_logit_diff"] < 1e-4
    check_hf(folder, vectors)
    for inside in (official, official / "below"):
        assert run_convert("official-to-hf", "--load-dir", official, "--hf-dir", inside) == 2
        assert f"must lie outside what is converted, {official}" in capsys.readouterr().err
    assert run_convert("official-to-hf", "--load-dir", folder, "--hf-dir", tmp_path / "more") == 2
    assert "must be of the official form, whose model_type is llama. Got moh_llama" in capsys.readouterr().err
    into = ("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "other")
    for change, message in (
        ("moh.active_heads=5", "moh.active_heads: 6 in config.json, 5 in the configuration"),
        (
            "moh.shared_heads=[[0,2,4,6],[0,1,2,3]]",
            "moh.shared_heads: (0, 1, 2, 3) in config.json, [(0, 2, 4, 6)",
        ),
        ("moh.enabled=false", "moh.enabled: True in config.json, False in the configuration"),
    ):
        assert run_convert(*into, change) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
    assert run_convert(*into, "moh.shared_heads=4", "moh.active_heads=75%") == 0
    again = tmp_path / "again"
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", again, "parallel.tensor=4") == 0
    config = layout.read_config(again)
    assert (config.moh.router, config.moh.shared_heads, config.moh.active_heads) == ("query_norm", 4, 6)
    assert run_convert("megatron-to-hf", "--load-dir", again, "--hf-dir", folder, "--dtype", "bf16") == 0
    check_hf(folder, vectors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("moh.active_heads=7", "the first 4 heads shared and 6 active in every layer"),
        ("moh.shared_heads=[[0,2,4,6],[0,1,2,3]]", "the first 4 heads shared"),
        ("moh.balancing=bias", "without biases"),
        ("moh.router=learned", "needs moh.router query_norm"),
        ("model.rope_scaling={type: llama3, factor: 8}", "disagree"),
    ],
)
def test_official_export_refuses_models_the_official_file_cannot_compute(official, tmp_path, capsys, change, message):
    code = run_convert("hf-to-megatron", "--hf-dir", official, "--save-dir", tmp_path / "ckpt", *MOH, change)
    arguments = ("--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "hf", "--format", "official")
    if code == 0:
        for tried in ((*arguments, "--dry-run"), arguments):
            capsys.readouterr()
            assert run_convert("megatron-to-hf", *tried) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_llama_export_is_for_dense_models_only(official, vectors, tmp_path, capsys):
    for name, moh in (("moh", MOH), ("dense", ())):
        assert run_convert("hf-to-megatron", "--hf-dir", official, "--save-dir", tmp_path / name, *moh) == 0
    arguments = ("--hf-dir", tmp_path / "hf", "--format", "llama")
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "moh", *arguments) == 2
    assert "--format llama needs a dense model" in capsys.readouterr().err
    assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "dense", *arguments) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert (model(vectors["input_ids"]).logits - vectors["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("moh", [MOH, ()], ids=["upcycled", "dense"])
def test_wrong_import_is_a_fault_and_leaves_nothing(official, tmp_path, monkeypatch, capsys, moh):
    into = ("hf-to-megatron", "--hf-dir", official, "--save-dir", tmp_path / "ckpt", "--verify", *moh)
    assert run_convert(*into) == 0
    messages = capsys.readouterr().err
    assert ("with all heads active, against the dense model:" in messages) == bool(moh)
    assert "KL divergence" in messages
    join_qkv = mapping.join_qkv

    def wrong(parts, *arguments):
        query, key, value = parts
        return join_qkv((query.roll(8, 0), key, value), *arguments)

    monkeypatch.setattr(mapping, "join_qkv", wrong)
    assert run_convert(*into[:4], tmp_path / "wrong", *into[5:]) == 1
    messages = capsys.readouterr().err
    assert "the checkpoint's logits differ from those of" in messages
    assert "Traceback" not in messages
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_official_to_hf_refuses_head_numbers_not_divisible_by_4(tmp_path, capsys):
    folder = llama_folder(tmp_path / "hf", num_attention_heads=6, num_key_value_heads=3, hidden_size=48)
    assert run_convert("official-to-hf", "--load-dir", folder, "--hf-dir", tmp_path / "back") == 2
    assert "needs num_attention_heads divisible by 4. Got 6" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
