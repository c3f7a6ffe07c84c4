"""The balance loss, and the function that adds it to the main loss."""

import pytest
import torch
from torch.testing import assert_close

from moh_megatron.moh.losses import attach_loss, balance_loss
from moh_megatron.moh.routing import learned_routing

PROBABILITY = [0.5, 0.3, 0.2]
LOAD = [0.9, 0.1, 1.0]


def test_balance_loss_has_paper_and_scaled_form():
    probability, load = torch.tensor(PROBABILITY), torch.tensor(LOAD)
    assert_close(balance_loss(probability, load, "paper"), torch.tensor(0.68))
    assert_close(balance_loss(probability, load, "scaled"), torch.tensor(3 * 0.68))


@pytest.mark.parametrize(("form", "factor"), [("paper", 1.0), ("scaled", 3.0)])
def test_balance_loss_gradient_reaches_the_probability_only(form, factor):
    probability = torch.tensor(PROBABILITY, requires_grad=True)
    load = torch.tensor(LOAD, requires_grad=True)
    balance_loss(probability, load, form).backward()
    assert_close(probability.grad, factor * torch.tensor(LOAD))
    assert load.grad is None


def test_balance_loss_is_one_for_even_load_and_higher_for_skew():
    even = torch.full((4,), 0.25)
    assert balance_loss(even, even, "scaled") == 1.0
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert balance_loss(skewed, torch.tensor([1.0, 0.0, 0.0, 0.0]), "scaled") > 1.0


@pytest.mark.parametrize("weight", [0.01, 1.0, 0.0])
def test_attach_loss_equals_adding_the_loss(weight):
    def gradients(attach: bool):
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((5, 4), (6, 4)))
        gates, _, balance = learned_routing(x, None, w, None, top_k=2)
        if attach:
            attached = attach_loss(gates, balance, weight)
            assert torch.equal(attached, gates)
            attached.square().sum().backward()
        else:
            (gates.square().sum() + weight * balance).backward()
        return x.grad, w.grad

    assert_close(gradients(True), gradients(False), rtol=1e-6, atol=1e-7)


def test_attached_weight_is_not_scaled_by_later_operations():
    tensor, source = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (1000 * attach_loss(tensor, 3 * source, 0.25).sum()).backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [1000.0] * 3
    assert source.grad == 0.75


def test_attached_losses_add_up_over_layers_and_micro_batches():
    source = torch.tensor(2.0, requires_grad=True)
    for _ in range(2):
        tensor = torch.ones(3, requires_grad=True)
        for _ in range(4):
            tensor = attach_loss(tensor, source.square(), 0.5)
        tensor.sum().backward()
    assert source.grad == 2 * 4 * 0.5 * 2 * 2.0


def test_recomputation_counts_an_attached_loss_once():
    from torch.utils.checkpoint import checkpoint

    source, x = torch.tensor(2.0, requires_grad=True), torch.ones(3, requires_grad=True)
    for reentrant in (True, False):
        source.grad = None
        out = checkpoint(lambda x: attach_loss(x * 2, source * source, 0.5), x, use_reentrant=reentrant)
        assert isinstance(out, torch.Tensor)
        out.sum().backward()
        assert source.grad == 2.0


def test_attach_loss_without_gradients_returns_the_tensor():
    tensor = torch.ones(3)
    with torch.no_grad():
        out = attach_loss(tensor, torch.tensor(1.0, requires_grad=True), 1.0)
    assert torch.equal(out, tensor)
    assert not out.requires_grad
