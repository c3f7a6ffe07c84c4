"""Loss and KL divergence of MoH models against the dense model they were made of."""

from __future__ import annotations

import statistics

import pytest
import torch.nn.functional as F

from moh_megatron.model.single import logits
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.loss_and_kl import (
    mean,
    measure_loss_and_kl,
    recovered_share,
    set_active_heads,
    upcycled_model,
)


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize("balancing", ["loss", "bias"])
def test_kl_is_zero_with_all_heads_active(tiny, dense, documents, router, balancing):
    config = tiny({"moh.router": router, "moh.balancing": balancing})
    model = upcycled_model(config, dense)
    _, values = measure_loss_and_kl(dense, {"all": (model, 8), "half": (model, 4)}, documents)
    assert max(values["all"].divergences) < 1e-8
    assert min(values["half"].divergences) > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"moh.gate_softmax": "group"}, {"moh.router": "query_norm"}, {"moh.backend": "slots"}], ids=str
)
def test_kl_is_zero_with_all_heads_of_each_kv_group_active(tiny, grouped_dense, grouped, documents, changes):
    model = upcycled_model(tiny({**grouped, **changes}), grouped_dense)
    variants = {"all": (model, 8), "most": (model, 6), "half": (model, 4)}
    _, values = measure_loss_and_kl(grouped_dense, variants, documents)
    assert max(values["all"].divergences) < 1e-8
    assert min(values["most"].divergences) > 1e-3
    assert sum(values["half"].divergences) > sum(values["most"].divergences)
    with pytest.raises(AssertionError):
        set_active_heads(model, 5)


def test_losses_and_divergences_equal_those_of_single_documents(tiny, dense, documents):
    model = upcycled_model(tiny({"moh.router": "query_norm"}), dense)
    losses, values = measure_loss_and_kl(dense, {"half": (model, 4)}, documents)
    target, output = (logits(one, documents[1][None, :-1])[0] for one in (dense, model))
    assert losses[1] == pytest.approx(float(F.cross_entropy(target, documents[1][1:])), rel=1e-5)
    assert values["half"].losses[1] == pytest.approx(float(F.cross_entropy(output, documents[1][1:])), rel=1e-5)
    by_hand = (target.softmax(-1) * (target.log_softmax(-1) - output.log_softmax(-1))).sum(-1).mean()
    assert values["half"].divergences[1] == pytest.approx(float(by_hand), rel=1e-4)


def test_upcycled_model_shares_the_weights_of_the_dense_model(tiny, dense):
    shared = model_tensors(dense)
    tensors = model_tensors(upcycled_model(tiny(), dense))
    assert all(tensors[name].data_ptr() == tensor.data_ptr() for name, tensor in shared.items())


def test_means_and_recovered_shares_have_standard_errors():
    values = [1.0, 2.0, 4.0]
    assert mean(values).value == pytest.approx(7 / 3)
    assert mean(values).error == pytest.approx(statistics.stdev(values) / 3**0.5)
    start, dense_end = [5.0, 6.0, 7.0], [3.0, 3.5, 3.0]
    assert recovered_share(start, dense_end, dense_end).value == 1.0
    assert recovered_share(start, dense_end, dense_end).error == pytest.approx(0, abs=1e-12)
    assert recovered_share(start, start, dense_end).value == 0.0
    # Halfway on every document: no document says otherwise.
    half = [(one + other) / 2 for one, other in zip(start, dense_end, strict=True)]
    assert recovered_share(start, half, dense_end).value == pytest.approx(0.5)
    assert recovered_share(start, half, dense_end).error == pytest.approx(0, abs=1e-12)
