"""The exported code computes a prompt for the active heads alone where docs/conversion.md says that it was faster."""

from typing import Any

import pytest
import torch

from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM

PAYING = {
    (12, 12): (1024, {6}),
    (32, 8): (512, {16, 24}),
    (9, 3): (512, {4}),
    (8, 4): (512, {4}),
    (8, 1): (512, {4, 6}),
}
"""By (heads, groups): from which length on, and for which numbers of heads of 50, 75 and 90 %."""


def make_model(heads: int, groups: int, active: int) -> Any:
    torch.manual_seed(0)
    config = MoHConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=4,
        max_position_embeddings=1100,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        moh_shared_heads=2,
        moh_active_heads=active,
        moh_router="query_norm",
    )
    return MoHForCausalLM(config).eval()


@pytest.mark.parametrize("shape", PAYING, ids=lambda shape: f"{shape[0]}_in_{shape[1]}")
def test_heads_are_skipped_where_that_was_measured_to_pay(shape, monkeypatch):
    (heads, groups), (shortest, paying) = shape, PAYING[shape]
    layer = make_model(heads, groups, heads).model.layers[0].self_attn
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])

    def pays(length: int, count: int, seen: int | None = None, dtype: torch.dtype = torch.float32) -> bool:
        query = torch.zeros(2, heads, length, 4, dtype=dtype)
        key = torch.zeros(2, groups, seen or length, 4, dtype=dtype)
        active = torch.rand(2, length, heads).argsort(-1) < count
        return layer.skipping_pays(query, key, active)

    counts = [round(share * heads) for share in (0.5, 0.75, 0.9)]
    for length in (256, 511, 512, 1023, 1024, 2048):
        found = {count for count in counts if pays(length, count)}
        assert found == (paying if length >= shortest else set()), length
    assert not pays(2048, max(paying) + 1)
    few = min(paying)
    assert pays(shortest, 1)
    assert not pays(shortest, 1, dtype=torch.bfloat16)
    assert not pays(shortest, 1, dtype=torch.float16)
    assert not pays(1, few, seen=shortest + 1), "the next token"
    assert not pays(shortest, few, seen=shortest + 1), "more of a text that has begun"
    layer.train()
    assert not pays(shortest, few)
    layer.eval()
    for threads[0] in (2, 16):
        assert not pays(2048, few)


@pytest.mark.parametrize(
    ("groups", "active", "length", "sparse"),
    [
        (4, 4, 512, True),
        (4, 4, 511, False),
        (4, 6, 512, False),
        (2, 6, 512, True),
        (2, 7, 512, False),
        (8, 4, 1023, False),
        (8, 4, 1024, True),
    ],
)
def test_a_prompt_takes_the_path_that_pays(groups, active, length, sparse, sparse_calls):
    model = make_model(8, groups, active)
    prompt = torch.randint(1, 61, (1, length), generator=torch.Generator().manual_seed(4))
    asked = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
    assert sparse_calls == ([length] * 2 if sparse else []), "the prompt alone, in each of two layers"
    sparse_calls.clear()
    padded, mask = torch.cat([torch.zeros_like(prompt[:, :3]), prompt], 1), torch.ones(1, length + 3, dtype=torch.long)
    mask[:, :3] = 0
    dense = model.generate(padded, attention_mask=mask, pad_token_id=0, **asked)
    assert not sparse_calls
    assert torch.equal(dense[:, 3:], tokens)


def test_a_prompt_whose_tokens_all_see_each_other_takes_dense_attention(sparse_calls):
    model, prompt = make_model(8, 4, 4), torch.randint(1, 61, (1, 512), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        model(prompt, is_causal=False)
        assert not sparse_calls
        model(prompt, is_causal=True)
    assert sparse_calls == [512] * 2
