"""Exported folders: their content, equal logits after reloading, and that they replace no file of the user."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moh_megatron.checkpoint.hf import hf_export, transformers_io, verify
from moh_megatron.checkpoint.hf.verify import Trace
from moh_megatron.checkpoint.hf.weight_readers import HeldWeights
from moh_megatron.checkpoint.mapping import from_hf, rules
from moh_megatron.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    MoHConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.io.errors import Fault, UserError

VOCABULARY = 320
LETTERS = "the quick brown fox jumps over a lazy dog while vexing jackdaws love my big sphinx of quartz "


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([LETTERS * 3], vocab_size=VOCABULARY, character_coverage=1.0, out_dir=folder)
    return folder


def make_config(tie: bool = False, **moh: Any) -> Config:
    settings: dict[str, Any] = {"shared_heads": 2, "active_heads": 4} | moh
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            num_layers=2,
            hidden_size=48,
            ffn_hidden_size=40,
            num_attention_heads=6,
            num_query_groups=3,
            vocab_size=VOCABULARY,
            rotary_base=5000.0,
            tie_word_embeddings=tie,
        ),
        moh=MoHConfig(**settings),
        train=TrainConfig(sequence_length=64, total_tokens=64, global_batch_size=1, precision="fp32"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(inputs=("/some/where/prose.txt.gz",)),
    )


def make_state(config: Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {rule.megatron: 0.2 * torch.randn(rule.shape, generator=generator) for rule in rules(config)}


def export(folder: Path, config: Config, tokenizer_dir: Path, dtype=torch.float32, **changes: Any) -> None:
    settings: dict[str, Any] = {"step": 12, "tokens": 3456} | changes
    source = HeldWeights(settings.pop("state", make_state(config)), config)
    with hf_export.atomic_export(folder) as partial:
        hf_export.write_folder(partial, config, source, tokenizer_dir, dtype, **settings)


@pytest.mark.parametrize(
    "config",
    [make_config(), make_config(tie=True, router="query_norm"), make_config(enabled=False)],
    ids=["learned", "query_norm_tied", "dense"],
)
def test_export_reloads_with_every_weight(config, tokenizer_dir, tmp_path):
    folder = tmp_path / "runs" / "hf"
    export(folder, config, tokenizer_dir)
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    written = load_file(folder / "model.safetensors")
    state = make_state(config)
    again = from_hf(written, config)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "float32"
    assert settings["rope_parameters"]["rope_theta"] == 5000.0
    assert (settings["max_position_embeddings"], settings["num_key_value_heads"]) == (64, 3)
    if config.moh.enabled:
        assert settings["model_type"] == "moh_llama"
        assert (settings["moh_shared_heads"], settings["moh_active_heads"]) == (2, 4)
        source = Path(hf_export.__file__).with_name("hf_model")
        for name in ("configuration_moh.py", "modeling_moh.py"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    else:
        assert type(model).__name__ == "LlamaForCausalLM"
        assert settings["model_type"] == "llama"
        assert "auto_map" not in settings
        assert not list(folder.glob("*.py"))

    tokens = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = model(tokens).logits
    again = verify.trace_hf(transformers_io.open_export(folder), tokens)
    assert verify.compare(again, Trace(again.layers, reference)).logits.largest < 1e-5
    shifted = verify.compare(again, Trace(again.layers, reference + 0.25)).logits
    assert (shifted.largest, shifted.mean) == pytest.approx((0.25, 0.25), abs=1e-4)
    assert not verify.compare(again, Trace(again.layers, reference * torch.nan)).logits.largest < 1.0


def test_tokenizer_and_generation_settings(tokenizer_dir, tmp_path):
    export(tmp_path / "hf", make_config(), tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = tokenizer("the quick brown fox, naïve 漢字")["input_ids"]
    assert tokenizer.decode(ids) == "the quick brown fox, naïve 漢字"
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == generation.pad_token_id == tokenizer.eos_token_id == 1
    assert generation.max_length is None
    assert AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True).eos_token_id == 1


def test_changed_tokenizer_of_an_export_is_refused(tokenizer_dir, tmp_path):
    export(tmp_path / "hf", make_config(), tokenizer_dir)
    hf_export.check_exported_tokenizer(tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected sha256 \w+, the tokenizer the model learned with"):
        hf_export.check_exported_tokenizer(tmp_path / "hf")


def test_tokenizer_json_without_settings_encodes_the_same(tokenizer_dir, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    for name, config in (("moh", make_config()), ("dense", make_config(enabled=False))):
        export(tmp_path / name, config, tmp_path / "bare")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert tokenizer("a fox")["input_ids"] == AutoTokenizer.from_pretrained(tokenizer_dir)("a fox")["input_ids"]
        assert tokenizer.eos_token == "</s>"


def test_model_card_states_settings_and_training(tokenizer_dir, tmp_path):
    export(tmp_path / "hf", make_config(), tokenizer_dir, dtype=torch.bfloat16)
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("4 of 6 attention heads (67%)", "12 steps (3,456 tokens)", "| shared heads | 2 |", "`prose.txt.gz`",
                 "trust_remote_code=True", "| precision of these weights | bfloat16 |", "## Licence"):  # fmt: skip
        assert text in card
    assert "/some/where" not in card
    assert "{" not in card


def test_dtype_is_recorded_and_weights_rounded(tokenizer_dir, tmp_path):
    config = make_config()
    export(tmp_path / "hf", config, tokenizer_dir, dtype=torch.bfloat16)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.norm.weight"], make_state(config)["decoder.final_layernorm.weight"].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).dtype == torch.bfloat16


def test_large_models_are_sharded(tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "MAX_SHARD_SIZE", "100KB")
    config = make_config()
    export(tmp_path / "hf", config, tokenizer_dir)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert torch.equal(model.model.norm.weight, make_state(config)["decoder.final_layernorm.weight"])


def test_only_an_earlier_export_is_replaced(tokenizer_dir, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    export(folder, make_config(), tokenizer_dir)
    export(folder, make_config(enabled=False), tokenizer_dir)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert not (folder / "modeling_moh.py").exists()

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not of the earlier export: notes.txt"):
        export(folder, make_config(), tokenizer_dir)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(UserError, match="must be empty or an earlier export"):
        export(foreign, make_config(), tokenizer_dir)
    with pytest.raises(UserError, match="Got a file"):
        export(foreign / "config.json", make_config(), tokenizer_dir)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (foreign / "config.json").read_text() == "{}"


def test_failed_export_keeps_the_earlier_one(tokenizer_dir, tmp_path):
    folder = tmp_path / "hf"
    export(folder, make_config(), tokenizer_dir)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = make_config()
    state = make_state(config)
    state["decoder.final_layernorm.weight"] = torch.full((48,), 1e5)
    with pytest.raises(UserError, match=r"decoder\.final_layernorm\.weight: every value must be finite.*too large"):
        export(folder, config, tokenizer_dir, dtype=torch.float16, state=state)
    smaller = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(UserError, match=r"at most model\.vocab_size \(300\) entries\. Got 320"):
        export(folder, smaller, tokenizer_dir)

    def run_out_of_space() -> None:
        with hf_export.atomic_export(folder) as new:
            (new / "half").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(Fault, match=r"could not be written.*No space"):
        run_out_of_space()
    for path, error in ((tmp_path / "elsewhere" / "source", OSError), (folder / "config.json", Fault)):
        with pytest.raises(error, match="Input/output error"), hf_export.atomic_export(folder):
            raise OSError(5, "Input/output error", str(path))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_divergence_of_nearly_equal_logits_is_exact():
    generator = torch.Generator().manual_seed(2)
    logits, other = (4 * torch.randn(2, 64, 512, generator=generator) for _ in range(2))
    for step in (0.0, 1e-6, 1e-3):
        changed = logits + step * other
        divergence = verify.compare(Trace([], logits), Trace([], changed)).divergence
        assert divergence >= 0
        # Half the variance of the logits' difference under the model's distribution.
        assert divergence == pytest.approx(5.5 * step**2, rel=0.1, abs=1e-15)


@pytest.mark.parametrize(("largest", "allowed"), [(0.5, 1e-4), (20.0, 2e-3)])
def test_allowed_difference_is_proportional_to_large_logits(largest, allowed):
    logits = torch.linspace(-largest, largest / 2, 12).view(1, 2, 6)

    def comparison(difference: float) -> verify.Comparison:
        return verify.compare(Trace([], logits), Trace([], logits + difference))

    verify.require_agreement(comparison(0.8 * allowed), "the models differ")
    with pytest.raises(Fault, match=rf"the models differ by .*; less than {allowed:g} is required.*This is a bug\. "):
        verify.require_agreement(comparison(1.2 * allowed), "the models differ")
    near_a_tie = dataclasses.replace(comparison(1.2 * allowed), margin=3e-7)
    with pytest.raises(Fault, match=r"unless rounding chose another head: the nearest two were 3e-07 apart\."):
        verify.require_agreement(near_a_tie, "the models differ")
