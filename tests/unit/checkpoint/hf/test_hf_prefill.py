"""The exported code computes a prompt for the active heads alone where docs/conversion.md says so."""

from typing import Any

import pytest
import torch

from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM


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


def test_sparse_prefill_needs_fp32_one_thread_inference_and_a_complete_prompt(monkeypatch):
    heads, groups, length = 8, 4, 1024
    layer = make_model(heads, groups, heads).model.layers[0].self_attn
    threads = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])

    def is_faster(length: int, active: int, keys: int | None = None, dtype: torch.dtype = torch.float32) -> bool:
        query = torch.zeros(2, heads, length, 4, dtype=dtype)
        key = torch.zeros(2, groups, keys or length, 4, dtype=dtype)
        mask = torch.rand(2, length, heads).argsort(-1) < active
        return layer.skipping_is_faster(query, key, mask)

    assert is_faster(length, 1)
    assert not is_faster(length, heads)
    assert not is_faster(length, 1, dtype=torch.bfloat16)
    assert not is_faster(length, 1, dtype=torch.float16)
    assert not is_faster(1, 1, keys=length), "the next token"
    assert not is_faster(length, 1, keys=length + 1), "a continued prompt"
    layer.train()
    assert not is_faster(length, 1)
    layer.eval()
    for threads[0] in (2, 16):
        assert not is_faster(length, 1)


@pytest.mark.parametrize(
    ("heads", "groups", "active", "length", "sparse"),
    [
        (8, 4, 4, 512, True),
        (8, 4, 4, 511, False),
        (8, 4, 6, 512, False),
        (9, 3, 4, 512, True),
        (9, 3, 5, 512, False),
        (8, 2, 6, 512, True),
        (8, 2, 7, 512, False),
        (8, 1, 6, 512, False),  # One KV group is computed in slots, with tokens equal to those of the padded prompt.
        (8, 8, 4, 1023, False),
        (8, 8, 4, 1024, True),
    ],
)
def test_prefill_takes_the_faster_path_with_equal_tokens(heads, groups, active, length, sparse, sparse_calls):
    model = make_model(heads, groups, active)
    prompt = torch.randint(1, 61, (1, length), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert sparse_calls == ([length] * 2 if sparse else []), "once for the prompt, in both layers"
    sparse_calls.clear()
    padded, mask = torch.cat([torch.zeros_like(prompt[:, :3]), prompt], 1), torch.ones(1, length + 3, dtype=torch.long)
    mask[:, :3] = 0
    dense = model.generate(padded, attention_mask=mask, pad_token_id=0, **options)
    assert not sparse_calls
    assert torch.equal(dense[:, 3:], tokens)


def test_prefill_without_causal_mask_is_dense(sparse_calls):
    model, prompt = make_model(8, 4, 4), torch.randint(1, 61, (1, 512), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        model(prompt, is_causal=False)
        assert not sparse_calls
        model(prompt, is_causal=True)
    assert sparse_calls == [512] * 2
