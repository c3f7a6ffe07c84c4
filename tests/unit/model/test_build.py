"""The built model: parameter counts, initialisation, norms, optimizer groups, validation loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moh_megatron.config.load import config_from_mapping, load_config
from moh_megatron.config.parameter_count import parameter_count
from moh_megatron.config.schema import Config
from moh_megatron.data.batches import ValidationBatch
from moh_megatron.model.build import build_model, moh_layers, token_losses, transformer_config
from moh_megatron.model.norm import RMSNorm
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.model.tensors import model_tensors
from moh_megatron.moh.router import LearnedRouter
from moh_megatron.parallel import rng
from moh_megatron.train.engine import adamw
from moh_megatron.train.validation import validation_loss

pytestmark = pytest.mark.usefixtures("one_rank")


def config(model: dict[str, Any] | None = None, moh: dict[str, Any] | None = None) -> Config:
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 8, "vocab_size": 128}
    return config_from_mapping(
        {
            "run": {"dir": "unused"},
            "model": {**sizes, **(model or {})},
            "moh": {"shared_heads": 2, "active_heads": 4, **(moh or {})},
            "train": {"sequence_length": 16, "total_tokens": 64, "global_batch_size": 1, "precision": "fp32"},
            "optimizer": {"learning_rate": 1e-3},
        },
        "test",
    )


@pytest.mark.parametrize(
    ("model", "moh"),
    [
        ({}, {}),
        ({"num_query_groups": 2}, {}),
        ({"tie_word_embeddings": True}, {"shared_heads": 1}),
        ({"kv_channels": 32}, {"shared_heads": 0}),
        ({}, {"router": "query_norm"}),
        ({}, {"enabled": False}),
        ({}, {"shared_heads": 8, "active_heads": 8}),
    ],
)
def test_built_model_has_the_counted_parameters(model: dict[str, Any], moh: dict[str, Any]) -> None:
    made = config(model, moh)
    built = build_model(made)
    assert sum(p.numel() for p in built.parameters()) == parameter_count(made.model, made.moh).total
    assert token_losses(built, torch.randint(0, 128, (2, 17))).shape == (2, 16)


def test_dense_twin_has_the_same_weight_shapes() -> None:
    shapes = {name: p.shape for name, p in build_model(config()).named_parameters() if ".router." not in name}
    twin = {name: p.shape for name, p in build_model(config(moh={"enabled": False})).named_parameters()}
    assert shapes == twin


def test_all_heads_active_at_uniform_logits_equal_the_dense_model() -> None:
    all_active = config(moh={"shared_heads": 0, "active_heads": 8})
    sparse, dense = build_model(all_active), build_model(config(moh={"enabled": False}))
    with torch.no_grad():
        for layer in moh_layers(sparse):
            assert isinstance(layer.router, LearnedRouter)
            assert layer.router.w_routed is not None
            layer.router.w_routed.zero_()
        parameters = dict(sparse.named_parameters())
        for name, p in dense.named_parameters():
            p.copy_(parameters[name])
        tokens = torch.randint(0, 128, (2, 17))
        torch.testing.assert_close(token_losses(sparse, tokens), token_losses(dense, tokens), rtol=1e-6, atol=1e-6)


def test_initial_weights_follow_the_configuration() -> None:
    wide = {"hidden_size": 256, "ffn_hidden_size": 512, "init_method_std": 0.05}
    scaled = dict(build_model(config(wide, {"router_init_std": 0.3})).named_parameters())
    plain = dict(build_model(config({**wide, "scaled_residual_init": False})).named_parameters())
    projection = "decoder.layers.0.self_attention.linear_proj.weight"
    assert float(scaled[projection].std()) == pytest.approx(0.05 / (2 * 2) ** 0.5, rel=0.05)
    assert float(plain[projection].std()) == pytest.approx(0.05, rel=0.05)
    assert float(scaled["decoder.layers.0.self_attention.linear_qkv.weight"].std()) == pytest.approx(0.05, rel=0.05)
    assert float(scaled["decoder.layers.0.self_attention.router.w_routed"].std()) == pytest.approx(0.3, rel=0.1)
    assert float(plain["decoder.layers.0.self_attention.router.w_routed"].std()) == pytest.approx(0.05, rel=0.1)


def test_same_seed_gives_the_same_weights() -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return list(build_model(config()).parameters())

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    made = config()
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, precision=precision))
    ours, theirs = RMSNorm(transformer_config(made), 64, eps=1e-5), LlamaRMSNorm(64, eps=1e-5).to(dtype)
    weight, x = torch.randn(64).to(dtype), torch.randn(7, 64).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(weight)
        theirs.weight.copy_(weight)
    torch.testing.assert_close(ours(x), theirs(x))


def test_weight_decay_excludes_norms() -> None:
    model = build_model(config())
    optimizer = adamw(model, config())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if "layernorm" in name else 0.1), name


def test_optimizer_takes_its_values_from_the_configuration() -> None:
    made = config()
    other = dataclasses.replace(made.optimizer, adam_beta1=0.7, adam_beta2=0.8, adam_epsilon=1e-3, weight_decay=0.3)
    groups_made = adamw(build_model(made), dataclasses.replace(made, optimizer=other)).param_groups
    assert [group["betas"] for group in groups_made] == [(0.7, 0.8)] * 2
    assert [group["eps"] for group in groups_made] == [1e-3] * 2
    assert [group["weight_decay"] for group in groups_made] == [0.3, 0.0]


def test_rope_and_norms_follow_the_configuration() -> None:
    model = build_model(config({"rotary_base": 500.0, "norm_epsilon": 0.25}))
    expected = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(model.rotary_pos_emb.inv_freq, expected)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * 2 + 1
    assert {norm.eps for norm in norms} == {0.25}


def test_validation_loss_counts_each_token_once() -> None:
    model = build_model(config())
    tokens = torch.randint(0, 128, (3, 17))
    batches = [ValidationBatch(tokens[:2], 2), ValidationBatch(tokens[[2, 0]], 1), ValidationBatch(tokens[:2], 0)]
    with torch.no_grad():
        expected = float(token_losses(model, tokens).double().mean())
    assert validation_loss(model, batches, torch.device("cpu")) == pytest.approx(expected, rel=1e-6)


def test_random_states_are_restored() -> None:
    states = rng.capture()
    drawn = torch.rand(3)
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    with tracker.fork():
        inside = torch.rand(3)
    rng.restore(states)
    assert torch.equal(torch.rand(3), drawn)
    with tracker.fork():
        assert torch.equal(torch.rand(3), inside)


def test_shipped_small_models_have_the_papers_parameters() -> None:
    for name, expected in (("llm_s_dense", 185_617_152), ("llm_s_moh75", 185_617_152 + 129_024)):
        shipped = load_config(f"configs/pretrain/{name}.yaml")
        assert parameter_count(shipped.model, shipped.moh).total == expected
    assert parallel_state.get_tensor_model_parallel_world_size() == 1


def test_single_process_model_ignores_the_backend_of_training() -> None:
    made = config(moh={"backend": "triton", "straight_through": "chosen"})
    weights = {name: tensor.detach() for name, tensor in model_tensors(build_model(config())).items()}
    tokens = torch.randint(0, 128, (1, 9))
    assert torch.equal(
        logits(build_single_process(made, weights), tokens), logits(build_single_process(config(), weights), tokens)
    )
