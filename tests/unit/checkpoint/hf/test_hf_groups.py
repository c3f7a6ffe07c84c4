"""Exported models whose heads are chosen within KV groups: routing as in training, attention in slots, generation."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moh_megatron.checkpoint.hf.hf_model import modeling_moh
from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM, MoHRouter, Slots
from moh_megatron.moh.routing import choose_by_norm, query_norms, routed_heads, router_logits, weigh_heads

HEADS, GROUPS, SIZE = 8, 2, 4
SETTINGS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "moh_shared_heads": [[4, 1], [], [0, 5]],
    "moh_active_heads": [4, 6, 8],
    "moh_routing_groups": GROUPS,
}
LEARNED: dict[str, Any] = {"moh_router": "learned"}
QUERY_NORM: dict[str, Any] = {"moh_router": "query_norm"}
ROUTERS: dict[str, dict[str, Any]] = {
    "normalized": LEARNED,
    "normalized_group": LEARNED | {"moh_gate_softmax": "group"},
    "paper": LEARNED | {"moh_gating": "paper"},
    "paper_group": LEARNED | {"moh_gating": "paper", "moh_gate_softmax": "group"},
    "learned_bias": LEARNED | {"moh_bias_update_rate": 0.01},
    "query_norm": QUERY_NORM,
    "query_norm_bias": QUERY_NORM | {"moh_bias_update_rate": 0.01},
}
every_router = pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
both_routers = pytest.mark.parametrize("router", [LEARNED, QUERY_NORM], ids=["learned", "query_norm"])
LEFT_PADDED = torch.tensor([[0] * 5 + [1] * 14, [1] * 19])


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    model: Any = MoHForCausalLM(MoHConfig(**SETTINGS | changes)).eval()
    for layer in model.model.layers:
        if (steps := getattr(layer.self_attn.router, "bias_steps", None)) is not None:
            steps.copy_(torch.randint(-99, 99, steps.shape))
    return model


def dense_twin(model: Any) -> Any:
    """The same model, which computes every head by eager attention and multiplies it by its gate."""
    twin, config = copy.deepcopy(model), model.config
    twin.set_attn_implementation("eager")
    for layer in twin.model.layers:
        layer.self_attn.in_slots = False
        layer.self_attn.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
    return twin


# --- routing -------------------------------------------------------------------------------------------------------


@every_router
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_gates_are_those_of_training(router, layer):
    model = make_model(**router)
    config, built = model.config, model.model.layers[layer].self_attn.router
    shared, active = config.heads_of(layer)
    x, queries = torch.randn(2, 9, 24), torch.randn(2, 9, HEADS, SIZE)
    bias = built.bias_steps.float() * config.moh_bias_update_rate if config.moh_bias_update_rate else None
    settings: dict[str, Any] = {"top_k": active - len(shared), "balance": "scaled", "bias": bias, "groups": GROUPS}
    if config.moh_router == "learned":
        weights = [None if linear is None else linear.weight for linear in (built.shared, built.routed, built.alpha)]
        in_router_order = weigh_heads(
            router_logits(x, *weights), gating=config.moh_gating, gate_softmax=config.moh_gate_softmax, **settings
        ).gates
        expected = torch.empty_like(in_router_order)
        expected[..., built.order] = in_router_order
    else:
        routed = torch.tensor(routed_heads(HEADS, shared))
        expected = choose_by_norm(query_norms(queries), routed=routed, **settings).gates
    got = built(x, queries)
    assert_close(got, expected, rtol=1e-6, atol=1e-7)
    assert ((got > 0).unflatten(-1, (GROUPS, -1)).sum(-1) == active // GROUPS).all()


def test_biased_choice_of_nearly_equal_norms_is_that_of_training():
    settings: dict[str, Any] = {
        "num_attention_heads": 4,
        "moh_shared_heads": 0,
        "moh_active_heads": 2,
        "num_hidden_layers": 1,
    }
    router = MoHRouter(MoHConfig(**SETTINGS | settings | ROUTERS["query_norm_bias"]), 0)
    router.bias_steps.copy_(torch.tensor([0, 141, 142, 0]))
    queries = torch.zeros(1, 500, 4, SIZE)
    queries[..., 0] = 20 + 1e-5 * torch.rand(1, 500, 4)
    expected = choose_by_norm(
        query_norms(queries),
        routed=torch.arange(4),
        top_k=2,
        balance="scaled",
        bias=router.bias_steps * 0.01,
        groups=2,
    )
    gates = router(torch.zeros(1, 500, 24), queries)
    assert torch.equal(gates > 0, expected.active)
    # The scores of two heads lie sqrt(2) = 1.414 apart, which 141 steps of the bias do not outweigh, and 142 do.
    differ = queries[..., ::2, 0] != queries[..., 1::2, 0]
    assert torch.equal(gates[..., 0][differ[..., 0]] > 0, (queries[..., 0, 0] > queries[..., 1, 0])[differ[..., 0]])
    assert (gates[..., 2][differ[..., 1]] > 0).all()


def test_largest_norms_of_each_group_are_chosen():
    queries = torch.zeros(1, 1, HEADS, SIZE)
    queries[..., 0] = torch.tensor([9.0, 0.0, 8.0, 7.0, 0.0, 0.1, 0.3, 0.2])
    router = MoHRouter(MoHConfig(**SETTINGS | QUERY_NORM), 0)
    assert router(torch.zeros(1, 1, 24), queries).tolist() == [[[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0]]]


@pytest.mark.parametrize("softmax", ["layer", "group"])
def test_uniform_logits_give_every_active_head_gate_one(softmax):
    router = MoHRouter(MoHConfig(**SETTINGS | LEARNED | {"moh_gate_softmax": softmax}), 0)
    gates = router(torch.zeros(1, 3, 24), torch.zeros(1, 3, HEADS, SIZE))
    assert_close(gates, torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]).expand_as(gates), rtol=0, atol=1e-6)


# --- attention -----------------------------------------------------------------------------------------------------


class FixedGates(torch.nn.Module):
    """Stands in for a router whose gates are known: ``active`` heads of each group at random."""

    def __init__(self, batch: int, length: int, groups: int, width: int, active: int) -> None:
        super().__init__()
        rank = torch.rand(batch, length, groups, width).argsort(-1)
        gates = torch.rand(rank.shape, dtype=torch.float64) + 0.1
        self.gates = torch.nn.Parameter((gates * (rank < active)).flatten(2))

    def forward(self, _hidden_states: Tensor, _queries: Tensor) -> Tensor:
        return self.gates


@settings(max_examples=40)
@given(
    st.sampled_from([(1, 4), (2, 2), (2, 4), (3, 3), (4, 2)]),
    st.integers(1, 4),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["eager", "sdpa"]),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
)
def test_slots_equal_every_head_masked(shape, active, size, implementation, batch, length, bidirectional):
    (groups, width), heads = shape, shape[0] * shape[1]
    active = min(active, width)
    model = make_model(
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        moh_shared_heads=0,
        moh_active_heads=groups * active,
        moh_routing_groups=groups,
        attn_implementation=implementation,
    ).double()
    x = torch.randn(batch, length, 24, dtype=torch.float64)
    positions = model.model.rotary_emb(x, torch.arange(length)[None])
    router = FixedGates(batch, length, groups, width, active)
    mask = torch.full((1, 1, length, length), -torch.inf, dtype=torch.float64).triu(1)
    mask = torch.zeros_like(mask) if bidirectional else mask

    def output_and_gradients(model: Any, mask: Tensor | None) -> list[Any]:
        layer, leaf = model.model.layers[0].self_attn, x.clone().requires_grad_()
        layer.router = copy.deepcopy(router)
        out, _ = layer(leaf, positions, mask)
        out.square().sum().backward()
        assert layer.in_slots == (model is not twin and active < width)
        gates: Any = layer.router.gates
        return [
            out,
            leaf.grad,
            gates.grad * (gates > 0),
            *(layer.get_parameter(f"{n}_proj.weight").grad for n in "qkvo"),
        ]

    twin = dense_twin(model)
    twin.set_attn_implementation(implementation)  # Eager attention takes its softmax in fp32.
    expected = output_and_gradients(twin, mask)
    got = output_and_gradients(model, mask if bidirectional or implementation == "eager" else None)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


class FlashStub:
    """Stands in for FlashAttention: checks and keeps the shapes, and computes by PyTorch's own attention."""

    def __init__(self) -> None:
        self.heads: list[int] = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, None]:
        batch, heads, length, _ = query.shape
        assert key.shape == value.shape == (batch, GROUPS, length, SIZE)
        assert heads == GROUPS * module.num_key_value_groups
        self.heads.append(heads)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:  # FlashAttention gets the mask of the padding, [B, keys].
            mask = mask & attention_mask.bool()[:, None, None] | torch.eye(length, dtype=torch.bool)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=kwargs["scaling"], enable_gqa=True
        )
        return out.transpose(1, 2), None


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
@both_routers
def test_every_implementation_computes_the_logits_of_the_dense_twin(router, implementation, padded, monkeypatch):
    model, tokens = make_model(**router), torch.randint(61, (2, 19))
    mask = LEFT_PADDED if padded else torch.ones_like(tokens)
    flash = FlashStub()
    with torch.no_grad():
        expected = dense_twin(model)(tokens, attention_mask=mask).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)  # type: ignore[arg-type]
        model.config._attn_implementation = implementation
        # Compiling flex_attention takes minutes.
        with torch.compiler.set_stance("force_eager"):
            got = model(tokens, attention_mask=mask).logits
    assert_close(got[mask > 0], expected[mask > 0], rtol=1e-4, atol=2e-5)
    assert flash.heads == ([4, 6, 8] if implementation == "flash_attention_2" else [])


@both_routers
def test_model_with_one_kv_group_is_computed_in_slots(router):
    model = make_model(
        **router, num_key_value_heads=1, moh_routing_groups=1, moh_shared_heads=2, moh_active_heads=[3, 6, 8]
    )
    layers = [layer.self_attn for layer in model.model.layers]
    assert [layer.in_slots for layer in layers] == [True, True, False]
    assert [layer.num_key_value_groups for layer in layers] == [3, 6, 8]
    tokens = torch.randint(61, (2, 19))
    with torch.no_grad():
        assert_close(model(tokens).logits, dense_twin(model)(tokens).logits, rtol=1e-4, atol=2e-5)


def test_heads_chosen_in_the_whole_layer_are_not_computed_in_slots(monkeypatch):
    monkeypatch.setattr(modeling_moh, "Slots", None)
    model = make_model(moh_routing_groups=1)
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [4, 4, 4]
    model(torch.randint(61, (2, 19)))


def test_model_with_all_heads_active_computes_what_a_plain_llama_computes(monkeypatch):
    monkeypatch.setattr(modeling_moh, "Slots", None)
    model = make_model(**QUERY_NORM, moh_active_heads=8)
    plain: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in SETTINGS.items() if not k.startswith("moh")})).eval()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(61, (2, 19))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_eager_attention_returns_the_weights_of_the_slots():
    model, tokens = make_model(**QUERY_NORM), torch.randint(61, (2, 19))
    model.set_attn_implementation("eager")
    gates: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.router.register_forward_hook(lambda _module, _inputs, output: gates.append(output))
    with torch.no_grad():
        got = model(tokens, output_attentions=True).attentions
        chosen = list(gates)
        expected = dense_twin(model)(tokens, output_attentions=True).attentions
    assert [weights.shape for weights in got] == [(2, heads, 19, 19) for heads in (4, 6, 8)]
    for mine, theirs, active in zip(got, expected, chosen, strict=True):
        of_slots = theirs.transpose(1, 2)[active > 0].view(2, 19, -1, 19).transpose(1, 2)
        assert_close(mine, of_slots, rtol=1e-4, atol=1e-5)


def test_slots_hold_the_heads_in_use_in_rising_order():
    gates = torch.tensor([[[0.0, 0.5, 0.0, 2.0, 0.1, 0.0, 0.0, 0.3], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]]])
    slots, heads = Slots(gates, 2, 2), torch.arange(8.0).expand(1, 2, 8)
    # The second token's last group has one gate above 0: another head of the group fills the slot, with gate 0.
    assert slots.take(heads).tolist() == [[[1, 3, 4, 7], [2, 3, 6, 4]]]
    assert slots.take(gates)[0, 1, 3] == 0
    assert torch.equal(slots.put(slots.take(gates)), gates)


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prefill_chunk_size": 3}],
    ids=["dynamic", "static", "beams", "chunked"],
)
@both_routers
def test_cached_generation_of_a_grouped_model_equals_uncached(router, options):
    model, prompt = make_model(**router), torch.randint(1, 61, (2, 7))
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 16, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **arguments, **options)
    assert cached.shape == (2, 23)
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(cached, dense_twin(model).generate(prompt, use_cache=False, **arguments, **beams))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@both_routers
def test_left_padded_batch_of_a_grouped_model_generates_the_tokens_of_each_prompt(router, implementation):
    model = make_model(**router)
    model.set_attn_implementation(implementation)
    prompts = [torch.randint(1, 61, (1, length)) for length in (8, 13)]
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = [model.generate(prompt, attention_mask=torch.ones_like(prompt), **options) for prompt in prompts]
    padded = torch.cat([torch.nn.functional.pad(prompt, (13 - prompt.shape[1], 0)) for prompt in prompts])
    batched = model.generate(padded, attention_mask=(padded > 0).long(), pad_token_id=0, **options)
    for tokens, expected in zip(batched, alone, strict=True):
        assert torch.equal(tokens[-expected.shape[1] :], expected[0])


# --- settings ------------------------------------------------------------------------------------------------------


def test_saved_grouped_model_reloads_with_the_same_logits(tmp_path):
    model, tokens = make_model(**LEARNED, moh_gate_softmax="group"), torch.randint(61, (1, 9))
    model.save_pretrained(tmp_path)
    again: Any = MoHForCausalLM.from_pretrained(tmp_path)
    assert (again.config.moh_routing_groups, again.config.moh_gate_softmax) == (GROUPS, "group")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_folder_of_an_earlier_version_chooses_heads_in_the_whole_layer(tmp_path):
    model, tokens = make_model(**LEARNED, moh_routing_groups=1), torch.randint(61, (1, 9))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content.pop("moh_routing_groups"), content.pop("moh_gate_softmax")) == (1, "layer")
    (tmp_path / "config.json").write_text(json.dumps(content))
    again: Any = MoHForCausalLM.from_pretrained(tmp_path)
    assert (again.config.moh_routing_groups, again.config.moh_gate_softmax) == (1, "layer")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moh_routing_groups": 4}, r"moh_routing_groups must be 1 or num_key_value_heads \(2\)\. Got 4"),
        ({"moh_routing_groups": 0}, r"moh_routing_groups must be 1 or num_key_value_heads \(2\)\. Got 0"),
        ({"moh_routing_groups": "kv"}, r"moh_routing_groups must be 1 or num_key_value_heads \(2\)\. Got 'kv'"),
        ({"moh_routing_groups": True}, r"moh_routing_groups must be 1 or num_key_value_heads \(2\)\. Got True"),
        (
            {"moh_routing_groups": 3, "num_key_value_heads": 3},
            r"num_attention_heads must be a multiple of moh_routing_groups \(3\)\. Got 8",
        ),
        (
            {"moh_shared_heads": 2},
            r"moh_shared_heads must be equally many in each of the 2 routing groups .* Got \[2, 0\] in layer 0",
        ),
        (
            {"moh_active_heads": [4, 5, 8]},
            r"moh_active_heads must be a multiple of moh_routing_groups \(2\)\. Got 5 in layer 1",
        ),
        ({"moh_gate_softmax": "x"}, "moh_gate_softmax must be one of layer, group. Got 'x'"),
    ],
)
def test_bad_settings_of_groups_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MoHConfig(**SETTINGS | changes)
