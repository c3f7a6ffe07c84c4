"""Calibrations: measured against models without an output projection, written, read and refused."""

from __future__ import annotations

import json

import pytest
import torch
from support.messages import NONE_IS

from moh_megatron.checkpoint.mapping import from_hf, to_hf
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.io.errors import UserError
from moh_megatron.model.build import build_model, token_losses
from moh_megatron.model.single import build_single_process
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.calibrate import (
    Calibration,
    calibrate,
    read_calibration,
    with_calibrated_heads,
    write_calibration,
)

DENSE = {"moh.enabled": False, "model.init_method_std": 0.2}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def dense_weights(tiny, one_rank):
    """(configuration, weights) of a dense model whose KV groups are in another order than their numbers."""
    config = tiny(DENSE)
    torch.manual_seed(0)
    return config, {name: tensor.detach().clone() for name, tensor in model_tensors(build_model(config)).items()}


def test_removal_equals_the_loss_without_the_heads_output_projection(dense_weights, tokens):
    config, weights = dense_weights
    model = build_single_process(config, weights)
    calibration = calibrate(model, config, tokens)
    with torch.no_grad():
        loss = float(token_losses(model, tokens).double().mean())
    assert calibration.loss == pytest.approx(loss, abs=1e-6)
    assert calibration.tokens == 32
    assert [len(rises) for rises in calibration.removal] == [8, 8]
    for layer, head in ((0, 0), (0, 3), (1, 5)):
        named = to_hf(weights, config)
        named[f"model.layers.{layer}.self_attn.o_proj.weight"][:, head * 4 : head * 4 + 4] = 0
        with torch.no_grad():
            without = float(token_losses(build_single_process(config, from_hf(named, config)), tokens).double().mean())
        assert calibration.removal[layer][head] == pytest.approx(without - loss, abs=1e-5)


def test_calibration_leaves_the_model_unchanged(dense_weights, tokens):
    config, weights = dense_weights
    model = build_single_process(config, weights)
    before = token_losses(model, tokens)
    calibrate(model, config, tokens)
    assert torch.equal(token_losses(model, tokens), before)


CALIBRATION = Calibration(
    64, 3.0, ((0.1, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.3), (0.5, -0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.6))
)


def test_heads_with_the_largest_rise_are_shared():
    assert CALIBRATION.shared(3) == ((1, 2, 7), (0, 2, 7))
    assert CALIBRATION.ranking[0][:3] == (1, 7, 2)


def test_calibrated_placement_becomes_a_list_of_heads(tiny):
    config = tiny({"moh.shared_placement": "calibrated"})
    with pytest.raises(UserError, match="calibrated needs shared heads that are measured on a dense model"):
        layer_heads(config.model, config.moh)
    heads = layer_heads(config.model, with_calibrated_heads(config, CALIBRATION).moh)
    assert [layer.shared for layer in heads] == [(1, 7), (0, 7)]
    with pytest.raises(UserError, match=r"must be of 3 layers of 8 heads\. Got 2 of 8"):
        with_calibrated_heads(tiny({"moh.shared_placement": "calibrated", "model.num_layers": 3}), CALIBRATION)


def test_heads_with_the_largest_rise_of_each_group_are_shared(tiny, grouped):
    assert CALIBRATION.shared(4, groups=4) == ((1, 2, 4, 7), (0, 2, 4, 7))
    assert CALIBRATION.shared(4, groups=2) == ((1, 2, 4, 7), (0, 2, 4, 7))
    assert CALIBRATION.shared(2, groups=2) == ((1, 7), (0, 7))
    # The two heads of layer 0 that matter most are in one group.
    ranked = Calibration(64, 3.0, ((0.9, 0.1, 0.8, 0.7, 0.0, 0.2, -0.1, 0.1), (0.0,) * 6 + (0.1, 0.2)))
    assert ranked.shared(2) == ((0, 2), (6, 7))
    assert ranked.shared(2, groups=2) == ((0, 5), (0, 7))
    config = tiny({**grouped, "moh.shared_placement": "calibrated"})
    layers = layer_heads(config.model, with_calibrated_heads(config, ranked).moh)
    assert [(heads.shared, heads.groups) for heads in layers] == [((0, 5), 2), ((0, 7), 2)]


def test_calibrated_placement_with_a_list_of_heads_is_refused(tiny):
    with pytest.raises(UserError, match=r"calibrated needs moh\.shared_heads to be a number"):
        tiny({"moh.shared_placement": "calibrated", "moh.shared_heads": [[0, 1], [2, 3]]})


def test_a_written_calibration_is_read_back(tmp_path):
    file = tmp_path / "calibration.json"
    write_calibration(file, CALIBRATION)
    assert read_calibration(file) == CALIBRATION
    assert json.loads(file.read_text())["ranking"][1][:2] == [7, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"removal": None},
        {"removal": [["a"] * 8] * 2},
        {"removal": [[None] * 8] * 2},
        {"removal": [[float("nan")] * 8] * 2},
        {"tokens": "x"},
        {"loss": "1.0"},
        {"of": 5},
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path, changes):
    file = tmp_path / "calibration.json"
    write_calibration(file, CALIBRATION)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=r"calibration\.json: must be a calibration\. Got .* Delete it to"):
        read_calibration(file)


@pytest.mark.parametrize("content", [None, "{}", "[]", "[" * 100_000])
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content):
    file = tmp_path / "calibration.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    with pytest.raises(UserError, match=rf"calibration\.json: {NONE_IS} a calibration.* Delete it to measure again"):
        read_calibration(file)
