"""The code of exported models: routing by formula and against tensors of the official code, caches, training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from moh_megatron.checkpoint.hf.hf_model import modeling_moh
from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM, MoHRouter, attend_active, top_k_mask

GOLDEN = Path(__file__).parents[3] / "golden" / "official"
SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "moh_shared_heads": 2,
    "moh_active_heads": 4,
    "moh_router": "learned",
}


def make_model(**settings: Any) -> Any:
    torch.manual_seed(0)
    return MoHForCausalLM(MoHConfig(**SETTINGS | settings)).eval()


def make_router(**settings: Any) -> Any:
    torch.manual_seed(1)
    return MoHRouter(MoHConfig(**SETTINGS | settings), 0)


def golden(name: str) -> dict[str, torch.Tensor]:
    return {key: t.float() if t.is_floating_point() else t for key, t in load_file(GOLDEN / name).items()}


# --- routing -------------------------------------------------------------------------------------------------------


def softmax(values):
    exponents = [torch.exp(value) for value in values]
    return [value / sum(exponents) for value in exponents]


@pytest.mark.parametrize("gating", ["normalized", "paper"])
@pytest.mark.parametrize("shared", [0, 1, 2, 6])
def test_learned_gates_follow_the_formulas(gating, shared):
    active = 6 if shared == 6 else 4
    router = make_router(moh_gating=gating, moh_shared_heads=shared, moh_active_heads=active)
    x = torch.randn(2, 5, 24)
    gates = router(x, torch.zeros(2, 5, 6, 4))
    assert gates.shape == (2, 5, 6)
    token, got = x[1, 3].double(), gates[1, 3].double()

    def logits(linear):
        return list(linear.weight.double() @ token)

    shared_part = softmax(logits(router.shared)) if shared > 1 else [torch.tensor(1.0)] * shared
    if shared == 6:
        assert router.alpha is None
        assert router.routed is None
        assert_close(got, torch.stack(shared_part) * 6, rtol=1e-5, atol=1e-6)
        return
    routed, k = logits(router.routed), active - shared
    best = sorted(range(len(routed)), key=lambda head: -routed[head])[:k]
    pool = best if gating == "normalized" else range(len(routed))
    total = sum(torch.exp(routed[head]) for head in pool)
    scale = k if gating == "normalized" else 1
    routed_part = [
        scale * torch.exp(routed[head]) / total if head in best else torch.tensor(0.0) for head in range(6 - shared)
    ]
    factor = 2 if gating == "normalized" else 1
    alpha = [factor * value for value in softmax(logits(router.alpha))] if shared else [0.0, 1.0]
    spread = shared if gating == "normalized" else 1
    expected = [alpha[0] * spread * value for value in shared_part] + [alpha[1] * value for value in routed_part]
    assert_close(got, torch.stack([torch.as_tensor(value).double() for value in expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "shared"), [("dit_h8_s2_r4", 2), ("dit_h8_s0_r4", 0)])
def test_normalized_gates_equal_those_of_the_official_code(name, shared):
    case = golden(f"{name}.safetensors")
    router = make_router(
        hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8, moh_shared_heads=shared,
        moh_active_heads=shared + 4,
    )  # fmt: skip
    official = {"wg": "routed", "wg_0": "alpha", "wg_1": "shared"}
    router.load_state_dict(
        {
            f"{ours}.weight": case[f"weight.{key}.weight"]
            for key, ours in official.items()
            if f"weight.{key}.weight" in case
        }
    )
    gates = router(case["x"], torch.zeros(2, 17, 8, 8))
    assert torch.equal(gates > 0, case["gates"] > 0)
    assert_close(gates, case["gates"], rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_head():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert top_k_mask(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_query_norm_router_chooses_the_largest_norms():
    router = make_router(moh_router="query_norm")
    assert list(router.parameters()) == []
    queries = torch.zeros(1, 1, 6, 4)
    queries[0, 0, :, 0] = torch.tensor([9.0, 0.0, 1.0, -5.0, 2.0, 0.5])
    assert router(torch.zeros(1, 1, 24), queries).tolist() == [[[1.0, 1.0, 0.0, 1.0, 1.0, 0.0]]]
    assert router(torch.zeros(1, 1, 24), torch.zeros(1, 1, 6, 4)).tolist() == [[[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]]


def test_heads_of_each_layer():
    settings = {"moh_shared_heads": [[4, 1], [0]], "moh_active_heads": [3, 5], "moh_router": "query_norm"}
    config = MoHConfig(**SETTINGS | settings)
    queries = torch.zeros(1, 1, 6, 4)
    queries[0, 0, :, 0] = torch.tensor([9.0, 0.0, 1.0, -5.0, 2.0, 0.5])
    x = torch.zeros(1, 1, 24)
    assert MoHRouter(config, 0)(x, queries).tolist() == [[[1.0, 1.0, 0.0, 0.0, 1.0, 0.0]]]
    assert MoHRouter(config, 1)(x, queries).tolist() == [[[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]]]


def test_bias_changes_the_choice_of_heads_but_not_the_gates():
    router = make_router(moh_bias_update_rate=0.5)
    x = torch.randn(2, 5, 24)
    plain = router(x, torch.zeros(2, 5, 6, 4))
    router.bias_steps.copy_(torch.tensor([0, 0, 99, 0]))
    biased = router(x, torch.zeros(2, 5, 6, 4))
    assert (biased[..., 4] > 0).all()
    same = ((plain > 0) == (biased > 0)).all(-1)
    assert torch.equal(plain[same], biased[same])


def test_router_computes_in_fp32_under_autocast():
    router = make_router()
    x = torch.randn(1, 7, 24)
    expected = router(x, torch.zeros(1, 7, 6, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(x, torch.zeros(1, 7, 6, 4))
    assert got.dtype == torch.float32
    assert_close(got, expected, rtol=0, atol=0)


# --- the official MoH-LLaMA code -----------------------------------------------------------------------------------


def test_query_norm_model_computes_the_logits_of_the_official_code():
    settings = json.loads((GOLDEN / "llama_A.config.json").read_text())
    official = settings["_moh_official"]
    case = golden("llama_A.vectors.safetensors")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    model = make_model(
        **{name: settings[name] for name in names},
        head_dim=None,
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        moh_router="query_norm",
        moh_shared_heads=official["shared_heads"],
        moh_active_heads=official["shared_heads"] + official["routed_active"],
    )
    model.load_state_dict(golden("llama_A.weights.safetensors"), strict=True)
    masks = []
    for layer in model.model.layers:
        layer.self_attn.router.register_forward_hook(lambda _module, _inputs, gates: masks.append(gates))
    with torch.no_grad():
        logits = model(case["input_ids"]).logits
    assert torch.equal(torch.stack(masks), case["head_masks"].float())
    assert_close(logits, case["logits"], rtol=0, atol=2e-4)

    prompt = case["gen_prompt"]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert torch.equal(generated, case["gen_sequences"])


# --- the model as transformers uses it -----------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_attention_implementations_agree(router):
    model = make_model(moh_router=router)
    tokens = torch.randint(61, (2, 19))
    results = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = model(tokens, output_attentions=implementation == "eager")
    assert_close(results["sdpa"].logits, results["eager"].logits, rtol=1e-4, atol=1e-5)
    assert [weights.shape for weights in results["eager"].attentions] == [(2, 6, 19, 19)] * 2


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_cached_generation_equals_uncached(router):
    model = make_model(moh_router=router)
    prompt = torch.randint(61, (2, 7))
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **arguments)
    assert cached.shape == (2, 23)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments))


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("groups", [2, 3, 6])
def test_sparse_prefill_generates_the_tokens_of_dense_prefill(router, groups, sparse_calls, monkeypatch):
    model = make_model(moh_router=router, num_key_value_heads=groups, max_position_embeddings=700)
    prompt = torch.randint(61, (2, 600))
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    monkeypatch.setattr(modeling_moh, "SKIPPING_THRESHOLDS", {1: (10_000, 1.0)})
    dense, expected = model.generate(prompt, **arguments), model(prompt).logits
    assert not sparse_calls
    monkeypatch.setattr(modeling_moh, "SKIPPING_THRESHOLDS", {1: (512, 0.75)})
    assert torch.equal(model.generate(prompt, **arguments), dense)
    assert sparse_calls == [600, 600]
    with torch.no_grad():
        assert_close(model(prompt).logits, expected, rtol=1e-4, atol=1e-4)
    sparse_calls.clear()
    # Padding, gradients, eager attention and short prompts take the dense path.
    padded = torch.ones_like(prompt)
    padded[0, :9] = 0
    model.generate(prompt, attention_mask=padded, max_new_tokens=2, do_sample=False)
    model(prompt).logits.sum().backward()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(prompt)
        model(prompt[:, :500])
    assert not sparse_calls


def test_attend_active_equals_masked_dense_attention():
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, heads, 45, 8, generator=generator) for heads in (6, 2, 2))
    active = torch.rand(2, 45, 6, generator=generator) < 0.4
    active[1, :, 2] = False
    active[0, :, 3:] = False
    got = attend_active(query, key, value, active, 0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    assert_close(got, expected.transpose(1, 2) * active[..., None], rtol=1e-5, atol=1e-6)


def test_left_padding_does_not_change_generated_tokens():
    model = make_model()
    prompt = torch.randint(1, 61, (1, 8))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], 1)
    mask = (torch.arange(13) >= 5).long()[None]
    alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    batched = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(batched[:, 5:], alone)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = make_model().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        tokens = torch.arange(40).view(2, 20)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    loss, plain = gradients(False)
    loss_again, recomputed = gradients(True)
    assert loss == pytest.approx(loss_again)
    assert 0 < loss < 20
    assert all(grad is not None and grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        assert_close(recomputed[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_saved_model_reloads_with_the_same_logits(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again: Any = MoHForCausalLM.from_pretrained(tmp_path)
    assert again.config.moh_active_heads == 4
    assert again.config.moh_router == "learned"
    tokens = torch.randint(61, (1, 9))
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_bf16_model_computes_the_router_in_fp32():
    model = make_model().to(torch.bfloat16)
    seen = []
    model.model.layers[0].self_attn.router.register_forward_hook(lambda _m, _i, gates: seen.append(gates.dtype))
    assert model(torch.randint(61, (1, 9))).logits.dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_fp16_model_keeps_router_weights_in_fp32(tmp_path):
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in layer.self_attn.router.parameters():
                weight.mul_(1e-9)
    model.save_pretrained(tmp_path)
    again: Any = MoHForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert again.lm_head.weight.dtype == torch.float16
    for layer, kept in zip(model.model.layers, again.model.layers, strict=True):
        for name, weight in layer.self_attn.router.named_parameters():
            assert torch.equal(weight, kept.self_attn.router.get_parameter(name))
    assert again(torch.randint(61, (1, 9))).logits.dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moh_active_heads": 7}, r"moh_active_heads .* at most num_attention_heads \(6\)\. Got 7"),
        ({"moh_active_heads": 2}, r"moh_active_heads must be greater than moh_shared_heads \(2\).* Got 2"),
        ({"moh_shared_heads": -1}, r"moh_shared_heads must be from 0 .* Got -1"),
        (
            {"moh_shared_heads": 1.5},
            r"moh_shared_heads must be an integer, or a list with an entry for each layer\. Got 1.5",
        ),
        ({"moh_shared_heads": [[0], [0, 0]]}, r"moh_shared_heads\[1\] must be distinct heads below 6\. Got \[0, 0\]"),
        ({"moh_active_heads": [4]}, r"moh_active_heads must have an entry for each layer \(2\)\. Got 1"),
        ({"moh_router": "topk"}, r"moh_router must be one of learned, query_norm\. Got 'topk'"),
        ({"moh_gating": "x"}, "moh_gating must be one of normalized, paper"),
        ({"moh_balance_loss": "x"}, "moh_balance_loss must be one of scaled, paper"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoHConfig(**SETTINGS | settings)


def test_a_router_that_is_not_known_does_not_pass_for_another():
    config = MoHConfig(**SETTINGS)
    config.moh_router = "other"
    with pytest.raises(KeyError, match="other"):
        MoHRouter(config, 0)
