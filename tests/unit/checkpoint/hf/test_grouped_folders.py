"""Exported folders of models whose heads are chosen within KV groups, and what an import makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.convert import llama_folder, run_convert

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf import hf_export, hf_import
from moh_megatron.checkpoint.hf.hf_config import hf_config
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_extras import SpecialTokenIds
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM
from moh_megatron.checkpoint.hf.model_card import model_card
from moh_megatron.checkpoint.hf.verify import compare_forms
from moh_megatron.checkpoint.hf.weight_readers import HeldWeights
from moh_megatron.checkpoint.mapping import rules, to_hf
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.routers import initial_routers

GROUPED: dict[str, Any] = {
    "model.num_query_groups": 2,
    "moh.routing_groups": "kv",
    "moh.shared_heads": 2,
    "moh.shared_placement": "spread",
    "moh.active_heads": [4, 6],
}
GLOBAL: dict[str, Any] = {"model.num_query_groups": 2, "moh.shared_heads": 2, "moh.active_heads": 4}
FORMS = {
    "learned": {},
    "gates_within_groups": {"moh.gate_softmax": "group"},
    "paper": {"moh.gating": "paper", "moh.gate_softmax": "group"},
    "bias": {"moh.balancing": "bias", "moh.bias_update_rate": 0.02},
    "no_shared_heads": {"moh.shared_heads": 0, "moh.gating": "paper"},
    "query_norm": {"moh.router": "query_norm"},
    "query_norm_bias": {"moh.router": "query_norm", "moh.balancing": "bias", "moh.bias_update_rate": 0.02},
    "one_kv_group": {"model.num_query_groups": 1, "moh.gate_softmax": "group"},
}
in_every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def random_weights(config: Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        rule.megatron: torch.randint(-40, 41, rule.shape, generator=generator)
        if rule.dtype is not None
        else 0.25 * torch.randn(rule.shape, generator=generator) + ("norm" in rule.megatron)
        for rule in rules(config)
    }


def export(folder: Path, config: Config) -> Path:
    with hf_export.atomic_export(folder) as partial:
        source = HeldWeights(random_weights(config), config)
        hf_export.write_folder(partial, config, source, folder / "none", None, step=3, tokens=192)
    return folder


@in_every_form
def test_exported_grouped_model_computes_the_logits_of_the_training_model(tiny, one_rank, form):
    config = tiny(GROUPED | form)
    weights = random_weights(config)

    def exported() -> Any:
        settings: Any = hf_config(config, torch.float32, SpecialTokenIds())
        model: Any = MoHForCausalLM(settings)
        model.load_state_dict(to_hf(weights, config))
        assert all(layer.self_attn.in_slots for layer in model.model.layers)
        return model.eval()

    comparison = compare_forms(config, weights, exported)
    assert comparison.margin > 1e-6, "far enough from a tie that both models choose the same heads"
    assert comparison.logits.largest < 2e-5


@in_every_form
def test_grouped_model_survives_import_and_export(tiny, tmp_path, form):
    config = tiny(GROUPED | form)
    source = export(tmp_path / "hf", config)
    stated = json.loads((source / "config.json").read_text())
    groups = config.model.query_groups
    assert stated["moh_routing_groups"] == groups
    assert stated["moh_gate_softmax"] == (config.moh.gate_softmax if groups > 1 else "layer")
    checkpoint = tmp_path / "checkpoint"
    hf_import.hf_to_megatron(source, checkpoint, new_tensors=initial_routers)
    again = layout.read_config(checkpoint)
    assert again.moh.routing_groups == ("kv" if groups > 1 else 1)
    weights = layout.read_weights(checkpoint)
    assert all(torch.equal(weights[name], tensor) for name, tensor in random_weights(config).items())
    back = tmp_path / "back"
    assert run_convert("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", back) == 0
    assert json.loads((back / "config.json").read_text()) == stated
    written, expected = (load_file(folder / "model.safetensors") for folder in (back, source))
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_dense_model_becomes_a_grouped_one(tmp_path):
    source, checkpoint = llama_folder(tmp_path / "hf"), tmp_path / "checkpoint"
    moh = ("moh.enabled=true", "moh.routing_groups=kv", "moh.shared_heads=0", "moh.active_heads=50%")
    assert run_convert("hf-to-megatron", "--hf-dir", source, "--save-dir", checkpoint, *moh) == 0
    assert layout.read_config(checkpoint).moh.routing_groups == "kv"
    assert run_convert("megatron-to-hf", "--load-dir", checkpoint, "--hf-dir", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["moh_routing_groups"] == 4


@pytest.mark.parametrize(
    ("exported", "stated", "message"),
    [
        (GROUPED, ["moh.routing_groups=1"], "moh.routing_groups: kv in config.json, 1 in the configuration"),
        (GLOBAL, ["moh.routing_groups=kv"], "moh.routing_groups: 1 in config.json, kv in the configuration"),
        (
            GLOBAL,
            ["moh.routing_groups=kv", "moh.shared_heads=2", "moh.shared_placement=spread"],
            "moh.routing_groups: 1 in config.json, kv in the configuration",
        ),
        (GROUPED, ["moh.gate_softmax=group"], "moh.gate_softmax: layer in config.json, group in the configuration"),
    ],
    ids=["kv_as_1", "1_as_kv", "1_as_kv_with_fitting_heads", "gate_softmax"],
)
@pytest.mark.parametrize("in_file", [False, True], ids=["override", "config_file"])
def test_folder_of_one_form_is_not_imported_as_the_other(tiny, tmp_path, capsys, exported, stated, message, in_file):
    source = export(tmp_path / "hf", tiny(exported))
    arguments = ["hf-to-megatron", "--hf-dir", source, "--save-dir", tmp_path / "checkpoint"]
    if in_file:
        file = tmp_path / "own.yaml"
        file.write_text("\n".join(["moh:", *(f"  {item.removeprefix('moh.').replace('=', ': ')}" for item in stated)]))
        assert run_convert(*arguments, "--config", file) == 2
    else:
        assert run_convert(*arguments, *stated) == 2
    assert message in (error := capsys.readouterr().err)
    assert "Leave these keys out" in error
    assert not (tmp_path / "checkpoint").exists()


def test_configuration_of_the_same_form_is_accepted(tiny, tmp_path):
    source = export(tmp_path / "hf", tiny(GROUPED))
    arguments = ("hf-to-megatron", "--hf-dir", source, "--save-dir", tmp_path / "checkpoint")
    assert run_convert(*arguments, "moh.routing_groups=kv", "moh.shared_heads=2", "moh.shared_placement=spread") == 0
    source = export(tmp_path / "one", tiny(GLOBAL | {"model.num_query_groups": 1}))
    arguments = ("hf-to-megatron", "--hf-dir", source, "--save-dir", tmp_path / "same")
    # With one KV group the two forms are the same.
    assert run_convert(*arguments, "moh.routing_groups=kv", "moh.shared_placement=spread") == 0


def changed(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moh_routing_groups": 4}, "moh_routing_groups must be 1 or num_key_value_heads (2). Got 4."),
        ({"moh_routing_groups": True}, "moh_routing_groups must be 1 or num_key_value_heads (2). Got True."),
        ({"moh_routing_groups": "kv"}, "moh_routing_groups must be 1 or num_key_value_heads (2). Got 'kv'."),
        ({"moh_gate_softmax": "head"}, "moh.gate_softmax"),
        ({"moh_active_heads": [5, 6]}, "moh.active_heads[0] must be a multiple of the KV groups (2)"),
        ({"moh_shared_heads": [[0, 1], [0, 4]]}, "moh.shared_heads[0] must have equally many heads in each"),
    ],
)
def test_bad_values_of_groups_in_a_folder_are_refused(tiny, tmp_path, capsys, changes, message):
    source = changed(export(tmp_path / "hf", tiny(GROUPED)), **changes)
    assert run_convert("hf-to-megatron", "--hf-dir", source, "--save-dir", tmp_path / "checkpoint") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "config.json" in error


def test_folder_of_an_earlier_version_is_read_as_one_group(tiny, tmp_path):
    source = export(tmp_path / "hf", tiny(GLOBAL))
    content = json.loads((source / "config.json").read_text())
    assert (content.pop("moh_routing_groups"), content.pop("moh_gate_softmax")) == (1, "layer")
    (source / "config.json").write_text(json.dumps(content))
    moh = HFConfigReader(source).sections()["moh"]
    assert (moh["routing_groups"], moh["gate_softmax"]) == (1, "layer")


def test_official_form_refuses_a_grouped_model(tiny):
    form = {"moh.router": "query_norm", "moh.shared_heads": [[0, 1, 4, 5]] * 2, "moh.active_heads": 6}
    with pytest.raises(UserError, match=r"--format official needs .* moh\.routing_groups 1, .* moh\.routing_groups kv"):
        hf_export.check_form(tiny(GROUPED | form | {"moh.shared_placement": "first"}), "official")


def test_model_card_says_where_heads_are_chosen(tiny):
    card = model_card(tiny(GROUPED | {"moh.gate_softmax": "group"}), dtype="float32", step=1, tokens=64)
    for text in (
        "They are equally many in each group of heads that share keys and values.",
        "| routing groups | the key/value groups |",
        "| gate softmax | over each group |",
        "Every attention implementation of transformers computes the active heads alone.",
    ):
        assert text in card
    card = model_card(tiny(GLOBAL), dtype="float32", step=1, tokens=64)
    assert "| routing groups | 1, the whole layer |" in card
    assert "elsewhere every head is computed" in card
    assert "equally many" not in card
