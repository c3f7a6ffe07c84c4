"""Hugging Face -> checkpoint -> Hugging Face at every tensor-parallel size keeps every tensor bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.convert import LLAMA3, llama_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moh_megatron.hf
from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf import convert, hf_config, hf_export, hf_extras, hf_import
from moh_megatron.checkpoint.hf.hf_model import configuration_moh
from moh_megatron.checkpoint.hf.weight_readers import HeldWeights
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.routers import initial_routers

pytestmark = pytest.mark.usefixtures("small_chunks")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def small_chunks():
    """Makes even small tensors pass in several chunks, into several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moh_megatron.checkpoint.hf.streaming.CHUNK_BYTES", 1000)
        patch.setattr(hf_import, "AUTO_VERIFY_PARAMETERS", 0)
        patch.setattr(hf_export, "MAX_SHARD_SIZE", "20KB")
        yield


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def round_trip(source: Path, work: Path, *overrides: str) -> Path:
    hf_import.hf_to_megatron(source, work / "checkpoint", None, overrides, new_tensors=initial_routers)
    convert.megatron_to_hf(layout.resolve_checkpoint(work / "checkpoint"), work / "back")
    return work / "back"


@st.composite
def llamas(draw: Any) -> dict[str, Any]:
    groups, width = draw(st.sampled_from([(1, 3), (2, 2), (3, 1), (3, 3), (4, 1), (4, 4), (6, 2), (8, 1)]))
    size = draw(st.sampled_from([2, 4, 6]))
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * width,
        "hidden_size": groups * width * draw(st.sampled_from([size, 4])),
        "head_dim": size,
        "intermediate_size": 12 * draw(st.integers(1, 3)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "vocab_size": draw(st.integers(5, 70)),
        "tie_word_embeddings": draw(st.booleans()),
        "dtype": draw(st.sampled_from(sorted(DTYPES))),
        "transformers_4": draw(st.booleans()),
        **(LLAMA3 if draw(st.booleans()) else {}),
    }


@settings(max_examples=25, deadline=None)
@given(llamas())
@example({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "tie_word_embeddings": True})
@example({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36, "tie_word_embeddings": False})
def test_every_tensor_round_trips_bit_for_bit(tmp_path_factory, model):
    source = llama_folder(tmp_path_factory.mktemp("source"), **model)
    expected, sizes = tensors(source), [size for size in (1, 2, 3, 4) if not model["num_key_value_heads"] % size]
    for size in sizes:
        back = round_trip(source, tmp_path_factory.mktemp("work"), f"parallel.tensor={size}")
        got = tensors(back)
        assert got.keys() == expected.keys()
        assert all(
            got[name].dtype == tensor.dtype and torch.equal(got[name], tensor) for name, tensor in expected.items()
        )
        converted, original = (AutoConfig.from_pretrained(folder) for folder in (back, source))
        for name in ("vocab_size", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(converted, name) == getattr(original, name)
        assert converted.dtype == original.dtype


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)
    return folder


@pytest.mark.parametrize(
    "moh",
    [
        {"shared_heads": 2, "active_heads": 4, "gating": "paper", "balance_loss": "paper"},
        {"shared_heads": 1, "active_heads": 4, "balancing": "bias", "bias_update_rate": 0.02},
        {"shared_heads": [[7, 2], [0, 5, 3]], "active_heads": [3, 6], "router": "query_norm"},
        {
            "shared_heads": [[7, 1, 2, 4], []],
            "active_heads": [8, 4],
            "routing_groups": "kv",
            "gate_softmax": "group",
            "balancing": "bias",
        },
        {"enabled": False},
    ],
    ids=["learned", "bias", "lists", "grouped", "dense"],
)
def test_exports_of_this_project_round_trip(tiny, tokenizer_dir, tmp_path, moh):
    config = tiny({"model.vocab_size": 280} | {f"moh.{key}": value for key, value in moh.items()})
    generator = torch.Generator().manual_seed(5)
    state = {
        rule.megatron: torch.randn(rule.shape, generator=generator)
        if rule.dtype is None
        else torch.randint(-40, 41, rule.shape, generator=generator)
        for rule in rules(config)
    }
    with hf_export.atomic_export(tmp_path / "hf") as folder:
        hf_export.write_folder(folder, config, HeldWeights(state, config), tokenizer_dir, None, step=3, tokens=192)
    for size in (1, 2, 4):
        back = round_trip(tmp_path / "hf", tmp_path / f"tp{size}", f"parallel.tensor={size}")
        again = layout.read_config(tmp_path / f"tp{size}" / "checkpoint")
        assert again.model.head_dim == config.model.head_dim
        weights = layout.read_weights(tmp_path / f"tp{size}" / "checkpoint")
        assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (back / name).read_text() == (tmp_path / "hf" / name).read_text()


def test_registered_classes_open_an_export_without_its_code(tiny, tokenizer_dir, tmp_path):
    config = tiny({"model.vocab_size": 280, "moh.router": "query_norm"})
    state = {rule.megatron: torch.randn(rule.shape) for rule in rules(config)}
    with hf_export.atomic_export(tmp_path / "hf") as folder:
        hf_export.write_folder(folder, config, HeldWeights(state, config), tokenizer_dir, None, step=3, tokens=192)
    for file in hf_config.CODE:
        (tmp_path / "hf" / file).write_text("raise SystemExit('the code of the folder was run')")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(model) is moh_megatron.hf.MoHForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("words").input_ids
    model.save_pretrained(tmp_path / "again")
    for file in hf_config.CODE:
        own = Path(configuration_moh.__file__).with_name(file).read_text()
        assert (tmp_path / "again" / file).read_text() == own, "the model must open without this package"


def test_import_leaves_code_of_the_tokenizer_behind(tokenizer_dir, tmp_path):
    source = llama_folder(tmp_path / "source", vocab_size=280)
    for file in tokenizer_dir.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    file = source / "tokenizer_config.json"
    stated = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    file.write_text(json.dumps(stated))
    (source / "evil.py").write_text("raise SystemExit('the code of the folder was run')")
    back = round_trip(source, tmp_path / "work")
    assert not (back / "evil.py").exists()
    assert "auto_map" not in (back / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_token_ids_and_generation_settings_round_trip(tokenizer_dir, tmp_path, with_tokenizer):
    ids = {"bos_token_id": 5, "eos_token_id": [9, 7], "pad_token_id": 7}
    source = llama_folder(tmp_path / "source", vocab_size=280, **ids)
    generation = '{"bos_token_id": 5, "eos_token_id": [9, 8], "do_sample": true, "temperature": 0.6}'
    (source / "generation_config.json").write_text(generation)
    unchanged = ("generation_config.json", "chat_template.jinja") if with_tokenizer else ("generation_config.json",)
    for file in tokenizer_dir.iterdir() if with_tokenizer else ():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    moh = ("moh.enabled=true", "moh.router=query_norm", "moh.shared_heads=4", "moh.active_heads=6")
    forms: dict[hf_export.Form, tuple[str, ...]] = {"llama": (), "moh": moh, "official": moh}
    for form, overrides in forms.items():
        checkpoint, back = tmp_path / form / "checkpoint", tmp_path / form / "hf"
        hf_import.hf_to_megatron(source, checkpoint, None, overrides, new_tensors=initial_routers)
        convert.megatron_to_hf(checkpoint, back, form=form)
        again = json.loads((back / "config.json").read_text())
        assert {key: again[key] for key in ids} == ids
        assert all((back / name).read_bytes() == (source / name).read_bytes() for name in unchanged)
        assert not (back / "token_ids.json").exists()
    convert.official_to_hf(tmp_path / "official" / "hf", tmp_path / "read")
    again = json.loads((tmp_path / "read" / "config.json").read_text())
    assert {key: again[key] for key in ids} == ids
    if with_tokenizer:
        assert AutoTokenizer.from_pretrained(tmp_path / "read", trust_remote_code=True).chat_template


def test_extras_survive_saving_by_training(tokenizer_dir, tmp_path):
    source = llama_folder(tmp_path / "source", vocab_size=280, eos_token_id=[9, 7])
    extras = hf_extras.read_extras(source)
    hf_extras.HFExtras(load_tokenizer(tokenizer_dir), extras).save(tmp_path / "one")
    hf_extras.HFExtras(load_tokenizer(tokenizer_dir), hf_extras.read_extras(tmp_path / "one")).save(tmp_path / "two")
    assert hf_extras.read_extras(tmp_path / "two") == extras
    assert hf_extras.special_token_ids(extras) == hf_extras.SpecialTokenIds(1, [9, 7], None)
    assert load_tokenizer(tmp_path / "two").sha256 == load_tokenizer(tokenizer_dir).sha256
    hf_extras.HFExtras(None, {}).save(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_export_refuses_precision_that_makes_new_routers_zero(tmp_path):
    source = llama_folder(tmp_path / "source")
    moh = ("moh.enabled=true", "moh.router=learned", "moh.shared_heads=2", "moh.active_heads=4")
    round_trip(source, tmp_path / "work", *moh)
    with pytest.raises(UserError, match=r"router\.\w+: its values, of at most \de-11, all become 0"):
        convert.megatron_to_hf(tmp_path / "work" / "checkpoint", tmp_path / "half", "fp16")
    assert not (tmp_path / "half").exists()


def test_import_adds_learned_routers_and_keeps_all_other_weights(tmp_path):
    source = llama_folder(tmp_path / "source", dtype="bfloat16")
    moh = ("moh.enabled=true", "moh.router=learned", "moh.shared_heads=2", "moh.active_heads=4")
    back = round_trip(source, tmp_path / "work", *moh, "parallel.tensor=2")
    expected, got = tensors(source), tensors(back)
    assert all(torch.equal(got.pop(name), tensor) for name, tensor in expected.items())
    assert {name.split("router.")[1] for name in got} == {"shared.weight", "routed.weight", "alpha.weight"}
    assert json.loads((back / "config.json").read_text())["moh_active_heads"] == 4
