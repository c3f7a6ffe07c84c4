"""The YAML files that ship with the project."""

from pathlib import Path

import pytest

from moh_megatron.config import core_yaml
from moh_megatron.config.load import config_from_mapping, dump_config, load_config
from moh_megatron.config.validate import gradient_accumulation_steps

_CONFIGS = Path(__file__).parents[3] / "configs"
_FILES = sorted(file for file in _CONFIGS.rglob("*.yaml") if file.parent.name != "eval")
_PRETRAIN = _CONFIGS / "pretrain"


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_CONFIGS)))
def test_every_file_is_a_valid_configuration(file):
    config = load_config(file)
    assert config_from_mapping(core_yaml.parse(dump_config(config))[0], "dump") == config


@pytest.mark.parametrize("file", _FILES, ids=lambda file: str(file.relative_to(_CONFIGS)))
def test_no_value_of_a_base_is_repeated(file):
    own = core_yaml.parse(file.read_text())[0]
    if "base" not in own:
        return
    base = load_config(file.parent / own.pop("base"))
    for section, values in own.items():
        for key, value in values.items():
            assert getattr(getattr(base, section), key) != value, f"{section}.{key}"


def test_the_smoke_run_is_what_it_promises():
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
    replicas = load_config(_CONFIGS / "smoke.yaml", ["parallel.tensor=1"])
    assert gradient_accumulation_steps(replicas, 2) == 1


@pytest.mark.parametrize(
    ("size", "rates", "warmup"), [("s", (3e-4, 3e-5), 2000), ("b", (5e-4, 5e-5), 500)], ids=["LLM-S", "LLM-B"]
)
@pytest.mark.parametrize("share", ["dense", "moh75", "moh50"])
def test_the_papers_runs(size, rates, warmup, share):
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
