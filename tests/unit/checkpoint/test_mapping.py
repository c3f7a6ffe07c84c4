"""mapping: round trips between Megatron-core and Hugging Face, positions of single heads, tensor-parallel shards."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from moh_megatron.checkpoint.mapping import from_hf, merge_shards, rules, split_shard, to_hf
from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.schema import Config, ModelConfig, MoHConfig, OptimizerConfig, RunConfig, TrainConfig
from moh_megatron.io.errors import UserError


def make_config(heads=8, groups=4, size=4, layers=2, tie=False, **moh) -> Config:
    settings: dict[str, Any] = {"shared_heads": 2, "active_heads": 4} | moh
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            num_layers=layers,
            hidden_size=heads * size,
            ffn_hidden_size=24,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=size,
            vocab_size=48,
            tie_word_embeddings=tie,
        ),
        moh=MoHConfig(**settings),
        train=TrainConfig(sequence_length=16, total_tokens=16, global_batch_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def make_state(config: Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {rule.megatron: torch.randn(rule.shape, generator=generator) for rule in rules(config)}


@st.composite
def configs(draw) -> Config:
    groups, width = draw(st.sampled_from([(1, 4), (3, 3), (4, 2), (6, 1), (8, 1), (2, 5)]))
    heads = groups * width
    shared = draw(st.integers(0, heads - 1))
    return make_config(
        heads,
        groups,
        size=draw(st.integers(1, 5)),
        layers=draw(st.integers(1, 2)),
        tie=draw(st.booleans()),
        enabled=draw(st.booleans()),
        shared_heads=shared,
        active_heads=draw(st.integers(shared + 1, heads)),
        router=draw(st.sampled_from(["learned", "query_norm"])),
        balancing=draw(st.sampled_from(["loss", "bias"])),
        head_layout=draw(st.sampled_from(["interleaved", "contiguous"])),
    )


@hypothesis_settings(max_examples=40, deadline=None)
@given(configs())
def test_round_trip_is_bit_identical(config):
    state = make_state(config)
    exported = to_hf(state, config)
    assert ("lm_head.weight" in exported) is not config.model.tie_word_embeddings
    again = from_hf(exported, config)
    assert list(again) == list(state)
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    once_more = to_hf(again, config)
    assert all(torch.equal(once_more[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (6, 6), (9, 3)])
def test_each_head_lands_at_its_logical_place(heads, groups):
    """Weights that spell out which head they belong to, laid out as Megatron-core keeps them: group by group."""
    config = make_config(heads, groups)
    layout, width, size = HeadLayout(heads, groups, "interleaved"), heads // groups, config.model.head_dim
    blocks = []
    for group in layout.group_order:
        blocks += [float(group * width + slot) for slot in range(width)] + [100.0 + group, 200.0 + group]
    state = make_state(config)
    prefix = "decoder.layers.1.self_attention"
    hidden = config.model.hidden_size
    state[f"{prefix}.linear_qkv.weight"] = torch.tensor(blocks).repeat_interleave(size)[:, None].expand(-1, hidden)
    state[f"{prefix}.linear_proj.weight"] = (
        torch.tensor(layout.head_order).float().repeat_interleave(size).expand(hidden, -1)
    )
    exported = to_hf(state, config)

    def head_of_rows(name):
        return exported[f"model.layers.1.self_attn.{name}_proj.weight"].view(-1, size, hidden)[:, 0, 0].tolist()

    assert head_of_rows("q") == list(range(heads))
    assert head_of_rows("k") == [100 + group for group in range(groups)]
    assert head_of_rows("v") == [200 + group for group in range(groups)]
    columns = exported["model.layers.1.self_attn.o_proj.weight"][0].view(heads, size)[:, 0]
    assert columns.tolist() == list(range(heads))


def test_names_of_everything_but_attention():
    config = make_config(layers=1)
    state = make_state(config)
    exported = to_hf(state, config)
    layer, hf = "decoder.layers.0", "model.layers.0"
    assert torch.equal(exported["model.embed_tokens.weight"], state["embedding.word_embeddings.weight"])
    assert torch.equal(exported["lm_head.weight"], state["output_layer.weight"])
    assert torch.equal(exported["model.norm.weight"], state["decoder.final_layernorm.weight"])
    assert torch.equal(exported[f"{hf}.input_layernorm.weight"], state[f"{layer}.input_layernorm.weight"])
    assert torch.equal(exported[f"{hf}.post_attention_layernorm.weight"], state[f"{layer}.pre_mlp_layernorm.weight"])
    assert torch.equal(exported[f"{hf}.mlp.gate_proj.weight"], state[f"{layer}.mlp.linear_fc1.weight"][:24])
    assert torch.equal(exported[f"{hf}.mlp.up_proj.weight"], state[f"{layer}.mlp.linear_fc1.weight"][24:])
    assert torch.equal(exported[f"{hf}.mlp.down_proj.weight"], state[f"{layer}.mlp.linear_fc2.weight"])
    for name in ("shared", "routed", "alpha"):
        router = state[f"{layer}.self_attention.router.w_{name}"]
        assert torch.equal(exported[f"{hf}.self_attn.router.{name}.weight"], router)


@pytest.mark.parametrize(
    ("moh", "rows"),
    [
        ({"shared_heads": 2}, {"w_shared": 2, "w_routed": 6, "w_alpha": 2}),
        ({"shared_heads": 1}, {"w_routed": 7, "w_alpha": 2}),
        ({"shared_heads": 0}, {"w_routed": 8}),
        ({"router": "query_norm"}, {}),
        ({"router": "query_norm", "balancing": "bias"}, {"bias_steps": 6}),
        ({"shared_heads": ((0, 3, 5),)}, {"w_shared": 3, "w_routed": 5, "w_alpha": 2}),
        ({"enabled": False}, {}),
    ],
)
def test_router_weights_present(moh, rows):
    table = rules(make_config(layers=1, **moh))
    assert {r.megatron.split(".")[-1]: r.shape[0] for r in table if ".router." in r.megatron} == rows


@pytest.mark.parametrize("convert", [to_hf, from_hf])
def test_missing_unexpected_and_misshaped_tensors_are_refused_by_name(convert):
    config = make_config(layers=1)
    state = make_state(config)
    state = state if convert is to_hf else to_hf(state, config)
    name = next(key for key in state if "norm" in key)
    with pytest.raises(UserError, match=f"missing tensors: {name}"):
        convert({key: t for key, t in state.items() if key != name}, config)
    with pytest.raises(UserError, match="unexpected tensors: stray"):
        convert(state | {"stray": torch.zeros(1)}, config)
    with pytest.raises(UserError, match=rf"{name} must have shape \[32\]\. Got \[31\]"):
        convert(state | {name: torch.zeros(31)}, config)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_merge_to_the_full_tensor(world):
    for rule in rules(make_config()):
        full = torch.randn(rule.shape)
        shards = [split_shard(full, rule.dim, rule.stride, rank, world) for rank in range(world)]
        assert torch.equal(merge_shards(shards, rule.dim, rule.stride), full)
        if rule.dim is not None:
            assert shards[0].shape[rule.dim] == rule.shape[rule.dim] // world


def test_shard_of_fused_swiglu_holds_rows_of_gate_and_of_up():
    gate, up = torch.arange(8.0).view(4, 2), 100 + torch.arange(8.0).view(4, 2)
    shard = split_shard(torch.cat([gate, up]), 0, 2, rank=1, world=2)
    assert torch.equal(shard, torch.cat([gate[2:], up[2:]]))
    with pytest.raises(ValueError, match=r"dimension 0 must be a multiple of 2 x 3\. Got 8"):
        split_shard(torch.zeros(8, 2), 0, 2, rank=0, world=3)
