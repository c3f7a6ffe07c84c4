"""Tests of the YAML files that ship with the project."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moh_megatron.config import core_yaml
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.load import config_from_mapping, dump_config, load_config
from moh_megatron.config.validate import gradient_accumulation_steps

_CONFIGS = Path(__file__).parents[3] / "configs"
_FILES = sorted(file for file in _CONFIGS.rglob("*.yaml") if file.parent.name != "eval")
_PRETRAIN = _CONFIGS / "pretrain"
_TUNE = _CONFIGS / "continue_tune"
_SMOKE_IN_GROUPS = ["moh.routing_groups=kv", "moh.shared_placement=spread", "model.num_query_groups=2"]
"""The documented overrides by which the smoke run chooses heads within KV groups."""


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_CONFIGS)))
def test_shipped_file_is_a_valid_configuration(file):
    config = load_config(file)
    assert config_from_mapping(core_yaml.parse(dump_config(config))[0], "dump") == config


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_CONFIGS)))
def test_shipped_file_repeats_no_value_of_its_base(file):
    own = core_yaml.parse(file.read_text())[0]
    if "base" not in own:
        return
    base = load_config(file.parent / own.pop("base"))
    for section, values in own.items():
        for key, value in values.items():
            assert getattr(getattr(base, section), key) != value, f"{section}.{key}"


def test_smoke_run_has_the_documented_size():
    config = load_config(_CONFIGS / "smoke.yaml")
    model, moh, train = config.model, config.moh, config.train
    assert (model.num_layers, model.num_attention_heads, model.query_groups) == (4, 8, 4)
    assert moh.enabled
    assert moh.shared_heads == 2
    assert moh.active_heads in (4, 5, 6)
    assert train.sequence_length >= 256
    assert train.steps * train.tokens_per_step >= 1_000_000
    assert config.parallel.tensor == 2
    assert gradient_accumulation_steps(config, 2) == 2
    grouped = load_config(_CONFIGS / "smoke.yaml", _SMOKE_IN_GROUPS)
    assert {(heads.groups, heads.shared, heads.active) for heads in layer_heads(grouped.model, grouped.moh)} == {
        (2, (0, 4), 4)
    }
    load_config(_CONFIGS / "smoke.yaml", ["moh.routing_groups=kv", "moh.shared_heads=0"])
    assert f"make smoke ARGS='{' '.join(_SMOKE_IN_GROUPS)}'" in (_CONFIGS.parent / "docs/moh.md").read_text()
    replicas = load_config(_CONFIGS / "smoke.yaml", ["parallel.tensor=1"])
    assert gradient_accumulation_steps(replicas, 2) == 1


@pytest.mark.parametrize(
    ("size", "rates", "warmup"), [("s", (3e-4, 3e-5), 2000), ("b", (5e-4, 5e-5), 500)], ids=["LLM-S", "LLM-B"]
)
@pytest.mark.parametrize("share", ["dense", "moh75", "moh50"])
def test_pretraining_files_follow_the_paper(size, rates, warmup, share):
    name = f"llm_{size}_{share}"
    config = load_config(_PRETRAIN / f"{name}.yaml")
    assert config.run.dir == f"runs/{name}"
    assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate) == rates
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_learning_rate) == (warmup, 1e-7)
    assert (config.optimizer.weight_decay, config.optimizer.gradient_clipping) == (0.1, 1.0)
    assert (config.train.sequence_length, config.train.global_batch_size) == (2048, 2048)
    assert (config.train.total_tokens, config.train.steps) == (100_000_000_000, 23_842)
    assert config.moh.balance_coefficient == 0.01
    assert config.moh.enabled == (share != "dense")
    if config.moh.enabled:
        shared, active = config.moh.shared_heads, config.moh.active_heads
        assert isinstance(shared, int)
        assert isinstance(active, int)
        assert active / config.model.num_attention_heads == int(share[3:]) / 100
        assert (shared - 1) / active <= 0.4 < shared / active
    for world in (1, 8, 64):
        assert gradient_accumulation_steps(config, world) * config.train.micro_batch_size * world == 2048


@pytest.mark.parametrize(("size", "heads", "groups"), [("s", 12, 3), ("b", 16, 4)], ids=["LLM-S", "LLM-B"])
def test_grouped_query_files_differ_from_the_papers_in_heads_only(size, heads, groups):
    for share in ("dense", "moh75", "moh50"):
        ours, papers = (load_config(_PRETRAIN / f"llm_{size}_{kind}{share}.yaml") for kind in ("gqa_", ""))
        assert ours.run.dir == f"runs/llm_{size}_gqa_{share}"
        assert replace(ours.model, num_query_groups=None) == papers.model
        assert (ours.model.num_attention_heads, ours.model.query_groups) == (heads, groups)
        assert heads // groups == 4
        assert (ours.parallel, ours.data, ours.train, ours.optimizer) == (
            papers.parallel,
            papers.data,
            papers.train,
            papers.optimizer,
        )
        moh = {"routing_groups": 1, "shared_placement": "first", "shared_heads": papers.moh.shared_heads}
        assert replace(ours.moh, **moh) == papers.moh
        for heads_of_layer in layer_heads(ours.model, ours.moh) if ours.moh.enabled else ():
            assert heads_of_layer.groups == groups
            assert heads_of_layer.shared == tuple(range(0, heads, 4)), "the first head of each group"


@pytest.mark.parametrize(
    ("stage", "tokens", "steps", "rates"),
    [
        ("stage1", 300_000_000_000, 17_882, (6e-5, 6e-6)),
        ("stage2_dense", 100_000_000_000, 5_961, (2e-5, 1e-6)),
        ("stage2_moh75", 100_000_000_000, 5_961, (2e-5, 1e-6)),
        ("stage2_moh75_grouped", 100_000_000_000, 5_961, (2e-5, 1e-6)),
    ],
)
def test_continue_tuning_files_follow_the_paper(stage, tokens, steps, rates):
    config = load_config(_TUNE / f"llama3_8b_{stage}.yaml")
    model, moh, train, optimizer = config.model, config.moh, config.train, config.optimizer
    assert config.run.dir == f"runs/llama3_8b_{stage}"
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (32, 4096, 14336)
    assert (model.num_attention_heads, model.query_groups, model.vocab_size) == (32, 8, 160_896)
    assert (model.rotary_base, model.rope_scaling, model.norm_epsilon) == (500_000.0, None, 1e-5)
    assert not model.tie_word_embeddings
    assert (train.total_tokens, train.steps) == (tokens, steps)
    assert (train.sequence_length, train.global_batch_size) == (8192, 2048)  # 16M tokens
    assert (optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps) == (*rates, 50)
    assert (optimizer.weight_decay, optimizer.gradient_clipping) == (0.1, 1.0)
    assert config.parallel.tensor == (2 if stage == "stage1" else 1)
    assert (moh.enabled, moh.balance_coefficient) == (stage.startswith("stage2_moh75"), 0.01)
    if moh.enabled:
        grouped = stage.endswith("grouped")
        assert (moh.shared_heads, moh.active_heads) == (8 if grouped else 16, 24)
        assert (moh.router, moh.balancing) == ("query_norm", "loss")
        form = (moh.shared_placement, moh.routing_groups, moh.straight_through)
        assert form == (("calibrated", "kv", "chosen") if grouped else ("first", 1, "all"))
    assert moh.activation_schedule_steps == 0
    assert config.distillation.teacher is None


def test_stage_2_starts_from_the_results_of_stage_1():
    first, second = (load_config(_TUNE / f"llama3_8b_{name}.yaml") for name in ("stage1", "stage2_dense"))
    assert first.train.init_from == "runs/llama3_8b/dense"
    assert (first.tokenizer.path, first.tokenizer.grow_to) == ("runs/llama3_8b/hf", first.model.vocab_size)
    assert second.train.init_from == first.run.dir
    assert (second.tokenizer.path, second.tokenizer.grow_to) == (f"{first.run.dir}/data/tokenizer", None)
    assert second.data.dir not in (None, first.data.dir)


_CONTROLS = {
    "llama3_8b_stage2_moh75": "llama3_8b_stage2_dense",
    "llama3_8b_stage2_moh75_grouped": "llama3_8b_stage2_dense",
    "smollm2_135m_moh7": "smollm2_135m_dense",
    "smollm2_135m_moh6": "smollm2_135m_dense",
    "smollm2_135m_moh6_grouped": "smollm2_135m_dense",
    "smollm2_135m_moh5": "smollm2_135m_dense",
    "smollm2_135m_moh5_distilled": "smollm2_135m_dense",
}


def _keys(name: str) -> dict[str, Any]:
    sections = asdict(load_config(_TUNE / f"{name}.yaml"))
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


@pytest.mark.parametrize("arm", _CONTROLS)
def test_moh_file_differs_from_its_dense_control_in_heads_only(arm):
    ours, control = _keys(arm), _keys(_CONTROLS[arm])
    apart = {key for key, value in ours.items() if value != control[key]}
    assert {key for key in apart if not key.startswith("moh.")} <= {"run.dir", "distillation.teacher"}
    assert ("distillation.teacher" in apart) == arm.endswith("distilled")
    assert {"run.dir", "moh.enabled"} <= apart
    assert not control["moh.enabled"]


def test_every_moh_file_has_a_dense_control():
    tuned = {file.stem for file in _TUNE.glob("*.yaml") if load_config(file).moh.enabled}
    assert tuned == set(_CONTROLS)


@pytest.mark.parametrize(
    ("name", "active"),
    [("dense", None), ("moh7", 7), ("moh6", 6), ("moh6_grouped", 6), ("moh5", 5), ("moh5_distilled", 5)],
    ids=lambda value: str(value),
)
def test_smollm2_files_have_the_documented_values(name, active):
    config = load_config(_TUNE / f"smollm2_135m_{name}.yaml")
    model, moh, train = config.model, config.moh, config.train
    assert (model.num_attention_heads, model.query_groups, model.head_dim) == (9, 3, 64)
    assert train.steps * train.tokens_per_step >= 150_000
    assert (train.precision, train.init_from, config.data.dir) == ("fp32", "runs/smollm2/dense", "runs/smollm2/data")
    assert (config.optimizer.learning_rate, config.optimizer.min_learning_rate) == (1e-4, 1e-5)
    assert moh.enabled == (active is not None)
    if moh.enabled:
        placement = "spread" if active == 6 else "first"
        assert (moh.active_heads, moh.shared_heads, moh.shared_placement) == (active, 3, placement)
        assert moh.routing_groups == ("kv" if name.endswith("grouped") else 1)
        assert (moh.router, moh.straight_through) == ("query_norm", "chosen")
    assert config.distillation.teacher == ("runs/smollm2/dense" if name.endswith("distilled") else None)


def test_the_grouped_smollm2_file_shares_the_heads_of_its_twin():
    grouped, twin = (load_config(_TUNE / f"smollm2_135m_{name}.yaml") for name in ("moh6_grouped", "moh6"))
    assert replace(grouped.moh, routing_groups=1) == twin.moh
    (heads,) = set(layer_heads(grouped.model, grouped.moh))
    assert (heads.shared, heads.active, heads.groups) == ((0, 3, 6), 6, 3)
    assert heads.shared == layer_heads(twin.model, twin.moh)[0].shared
