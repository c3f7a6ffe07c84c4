"""Comparisons of two models report, for each layer, the differences of the models' own outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from moh_megatron.checkpoint.hf.hf_config import hf_config
from moh_megatron.checkpoint.hf.hf_extras import SpecialTokenIds
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM
from moh_megatron.checkpoint.hf.verify import TOLERANCE, Comparison, Trace, compare, compare_forms, require_agreement
from moh_megatron.checkpoint.mapping import rules, to_hf
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault

LAYERS, CHANGED = 4, 2
ROUNDING = 2e-5
KINDS = {
    "dense": {"moh.enabled": False},
    "learned": {"moh.router": "learned"},
    "query_norm": {"moh.router": "query_norm"},
}


@dataclass(frozen=True)
class Outputs:
    """What a model returns by itself, without a hook of ours."""

    layers: list[Tensor]
    logits: Tensor


def random_weights(config: Config) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    state = {rule.megatron: 0.25 * torch.randn(rule.shape, generator=generator) for rule in rules(config)}
    # The weights of norms lie around 1, as in a trained model.
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in state.items()}


def exported(config: Config, state: dict[str, Tensor]) -> Any:
    model_class: Any = MoHForCausalLM if config.moh.enabled else LlamaForCausalLM
    model = model_class(hf_config(config, torch.float32, SpecialTokenIds()))
    model.load_state_dict(to_hf(state, config))
    return model.eval()


@torch.no_grad()
def outputs(model: Any, tokens: Tensor) -> Outputs:
    last_layer = []
    hook = model.model.norm.register_forward_pre_hook(lambda _norm, inputs: last_layer.append(inputs[0]))
    found = model(tokens, output_hidden_states=True, use_cache=False)
    hook.remove()
    # hidden_states begins with the embeddings, and holds the last layer's output only after the final norm.
    return Outputs([*found.hidden_states[1:-1], *last_layer], found.logits)


def kl(left: Tensor, right: Tensor) -> float:
    """KL(left || right) of logits [B, S, V], mean over tokens, nats."""
    p, q = left.double().softmax(-1), right.double().softmax(-1)
    return (p * (p / q).log()).sum(-1).mean().item()


@pytest.fixture(scope="module", params=KINDS)
def case(request, tiny, one_rank) -> tuple[Config, dict[str, Tensor]]:
    config = tiny({"model.num_layers": LAYERS, **KINDS[request.param]})
    return config, random_weights(config)


def compared(config: Config, state: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[Comparison, Outputs, Outputs]:
    """Compare ``state`` with ``other``; returns the comparison, and both models' outputs for the same tokens."""
    theirs, inputs_seen = exported(config, other), []
    hook = theirs.model.embed_tokens.register_forward_pre_hook(lambda _embedding, inputs: inputs_seen.append(inputs[0]))
    found = compare_forms(config, state, lambda: theirs)
    hook.remove()
    (tokens,) = inputs_seen
    return found, outputs(exported(config, state), tokens), outputs(theirs, tokens)


def test_equal_models_agree_in_every_layer(case):
    config, state = case
    found, ours, _ = compared(config, state, state)
    assert [difference.name for difference in found.layers] == [f"layer {index}" for index in range(LAYERS)]
    assert max(difference.largest for difference in [*found.layers, found.logits]) < ROUNDING
    assert abs(found.divergence) < 1e-9
    assert found.magnitude == pytest.approx(ours.logits.abs().max().item(), rel=1e-4)
    assert (found.margin < math.inf) == config.moh.enabled
    require_agreement(found, "the two differ")


@pytest.mark.parametrize("part", ["mlp.linear_fc2.weight", "self_attention.linear_proj.weight"])
def test_changed_layer_is_reported_with_all_layers_after_it(case, part):
    config, state = case
    name = f"decoder.layers.{CHANGED}.{part}"
    found, ours, theirs = compared(config, state, {**state, name: 1.5 * state[name]})
    for index, (got, left, right) in enumerate(zip(found.layers, ours.layers, theirs.layers, strict=True)):
        assert got.name == f"layer {index}"
        if index < CHANGED:
            assert 0 <= got.mean <= got.largest < ROUNDING
        else:
            difference = (left - right).abs()
            assert got.largest == pytest.approx(difference.max().item(), rel=1e-3)
            assert got.mean == pytest.approx(difference.mean().item(), rel=1e-3)
            assert got.largest > 2 * got.mean > 100 * ROUNDING
    difference = (ours.logits - theirs.logits).abs()
    assert found.logits.largest == pytest.approx(difference.max().item(), rel=1e-3)
    assert found.logits.mean == pytest.approx(difference.mean().item(), rel=1e-3)
    assert found.divergence == pytest.approx(kl(ours.logits, theirs.logits), rel=1e-3)
    assert found.divergence > 1e-3
    assert found.magnitude == pytest.approx(ours.logits.abs().max().item(), rel=1e-4)
    with pytest.raises(Fault, match="the two differ by"):
        require_agreement(found, "the two differ")


def test_compare_gives_hand_computed_numbers():
    ours = Trace(
        [torch.zeros(1, 2, 2), torch.ones(1, 2, 2)], torch.tensor([[[3.0, 1.0], [-5.0, -5.0]]]).log_softmax(-1)
    )
    theirs = Trace(
        [torch.zeros(1, 2, 2), torch.tensor([[[1.0, 1.5], [-2.0, 1.0]]])],
        torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]])),
    )
    found = compare(ours, theirs)
    assert [(difference.name, difference.largest, difference.mean) for difference in found.layers] == [
        ("layer 0", 0.0, 0.0),
        ("layer 1", 3.0, 0.875),
    ]
    assert found.divergence == pytest.approx(kl(ours.logits, theirs.logits), rel=1e-6)
    assert found.divergence != pytest.approx(kl(theirs.logits, ours.logits), rel=0.1)
    assert str(found).splitlines() == [
        "layer 0: largest difference 0, mean 0",
        "layer 1: largest difference 3, mean 0.875",
        f"logits: largest difference {found.logits.largest:.3g}, mean {found.logits.mean:.3g}, "
        f"KL divergence {found.divergence:.3g} nats",
    ]
    assert found.allowed == TOLERANCE * max(1.0, ours.logits.abs().max().item())


def test_compare_refuses_models_of_different_depth():
    layer = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="argument"):
        compare(Trace([layer, layer], layer), Trace([layer], layer))
