from pathlib import Path

import pytest

from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.load import load_config
from moh_megatron.config.parameter_count import ParameterCount, parameter_count, router_weight_rows
from moh_megatron.config.schema import MoHConfig

_PRETRAIN = Path(__file__).parents[3] / "configs/pretrain"


@pytest.mark.parametrize(
    ("name", "dense", "router"),
    [
        ("llm_s_dense", 185_617_152, 0),
        ("llm_s_moh75", 185_617_152, 129_024),
        ("llm_s_moh50", 185_617_152, 129_024),
        ("llm_b_dense", 880_879_104, 0),
        ("llm_b_moh75", 880_879_104, 663_552),
        ("llm_b_moh50", 880_879_104, 663_552),
        # Without 9 of 12, and 12 of 16, key and value heads.
        ("llm_s_gqa_dense", 185_617_152 - 12 * 2 * 768 * 9 * 64, 0),
        ("llm_s_gqa_moh75", 175_000_320, 129_024),
        ("llm_s_gqa_moh50", 175_000_320, 129_024),
        ("llm_b_gqa_dense", 880_879_104 - 24 * 2 * 1536 * 12 * 96, 0),
        ("llm_b_gqa_moh75", 795_944_448, 663_552),
        ("llm_b_gqa_moh50", 795_944_448, 663_552),
    ],
)
def test_shipped_models_have_the_papers_parameters(name, dense, router):
    config = load_config(_PRETRAIN / f"{name}.yaml")
    count = parameter_count(config.model, config.moh)
    assert count == ParameterCount(dense=dense, router=router)
    assert count.total == dense + router


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        # embeddings 2 * 96 * 32, then 2 layers of q, o 2 * 32 * 32, k, v 2 * 32 * 16, SwiGLU 3 * 32 * 48, norms 2 * 32
        ({}, 6144 + 2 * (2048 + 1024 + 4608 + 64) + 32),
        ({"model.tie_word_embeddings": True}, 3072 + 2 * (2048 + 1024 + 4608 + 64) + 32),
        ({"model.num_query_groups": None}, 6144 + 2 * (2048 + 2048 + 4608 + 64) + 32),
        ({"model.kv_channels": 8}, 6144 + 2 * (4096 + 2048 + 4608 + 64) + 32),
    ],
)
def test_dense_parameters_equal_a_count_by_hand(configure, changes, dense):
    config = configure(changes)
    assert parameter_count(config.model, config.moh).dense == dense


@pytest.mark.parametrize(
    ("shared", "rows"),
    [
        (0, {"w_routed": 8}),
        (1, {"w_routed": 7, "w_alpha": 2}),
        (2, {"w_shared": 2, "w_routed": 6, "w_alpha": 2}),
        (7, {"w_shared": 7, "w_routed": 1, "w_alpha": 2}),
        (8, {"w_shared": 8}),
    ],
)
def test_router_weights_depend_on_shared_heads(configure, shared, rows):
    assert (
        router_weight_rows(MoHConfig(shared_heads=shared, active_heads=8), LayerHeads(8, tuple(range(shared)), 8))
        == rows
    )
    config = configure({"moh.shared_heads": shared, "moh.active_heads": 8})
    assert parameter_count(config.model, config.moh).router == 2 * 32 * sum(rows.values())


@pytest.mark.parametrize("changes", [{"moh.router": "query_norm"}, {"moh.enabled": False}])
def test_model_without_learned_router_has_no_router_parameters(configure, changes):
    config = configure(changes)
    assert parameter_count(config.model, config.moh).router == 0
