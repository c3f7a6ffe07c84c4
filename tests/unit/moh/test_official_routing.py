"""Both routers against tensors that the official code produced (tests/golden/official)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from moh_megatron.moh.losses import attach_loss
from moh_megatron.moh.routing import choose_by_norm, learned_routing

GOLDEN = Path(__file__).parents[2] / "golden" / "official"


def load(name: str) -> dict[str, torch.Tensor]:
    return {key: t.float() if t.is_floating_point() else t for key, t in load_file(GOLDEN / name).items()}


@pytest.fixture(params=[0, 2], ids=["no shared head", "two shared heads"])
def dit(request):
    return load(f"dit_h8_s{request.param}_r4.safetensors")


def test_gates_and_balance_loss_equal_the_official_ones(dit):
    routers = (dit.get(f"weight.{name}.weight") for name in ("wg_1", "wg", "wg_0"))
    routing = learned_routing(dit["x"], *routers, top_k=4)
    assert torch.equal(routing.active, dit["gates"] > 0)
    assert_close(routing.gates, dit["gates"], rtol=1e-5, atol=1e-6)
    assert_close(routing.balance_loss, dit["l_aux"].squeeze(), rtol=1e-5, atol=1e-6)


def test_layer_output_and_gradients_equal_the_official_ones(dit):
    """The official layer rebuilt around our router; its attention is not causal and has biases."""
    names = [name.removeprefix("weight.") for name in dit if name.startswith("weight.")]
    leaves = {name: dit[f"weight.{name}"].clone().requires_grad_() for name in names}
    x = dit["x"].clone().requires_grad_()
    routers = (leaves.get(f"{name}.weight") for name in ("wg_1", "wg", "wg_0"))
    routing = learned_routing(x, *routers, top_k=4)
    gates = attach_loss(routing.gates, routing.balance_loss, 0.01)
    batch, length, dim = x.shape
    qkv = F.linear(x, leaves["qkv.weight"], leaves["qkv.bias"]).view(batch, length, 3, 8, dim // 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    out = F.linear((heads * gates.unsqueeze(-1)).flatten(2), leaves["proj.weight"], leaves["proj.bias"])
    assert_close(out, dit["out"], rtol=1e-4, atol=1e-5)
    (out * dit["grad_probe"]).sum().backward()
    assert_close(x.grad, dit["grad.x"], rtol=1e-4, atol=1e-4)
    for name, leaf in leaves.items():
        expected = dit[f"grad.{name}"]
        assert leaf.grad is not None
        assert (leaf.grad - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_query_norm_masks_equal_the_released_llama():
    vectors = load("llama_A.vectors.safetensors")
    norms, masks = vectors["router_norms"], vectors["head_masks"].bool()
    routed = norms.shape[-1]
    shared = masks.shape[-1] - routed
    # The norms of the shared heads are not stored, and not needed.
    all_norms = torch.cat([torch.zeros(*norms.shape[:-1], shared), norms], -1)
    heads = torch.arange(shared, shared + routed)
    routing = choose_by_norm(all_norms, routed=heads, top_k=routed // 2, balance="scaled")
    assert torch.equal(routing.active, masks)
    assert torch.equal(routing.gates, masks.float())
