"""weights and optimizer_state: tensors by name, saved and loaded at any tensor-parallel size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moh_megatron.checkpoint import optimizer_state, weights
from moh_megatron.checkpoint.mapping import Rule, from_hf, rules, split_shard, to_hf
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError

COUNTS = Rule("router.counts", (), (4,))


class Empty(nn.Module):
    """Has the tensors of a table of names, filled with zeros."""

    def __init__(self, table, rank, size):
        super().__init__()
        self.tensors = {
            rule.megatron: split_shard(torch.zeros(rule.shape), rule.dim, rule.stride, rank, size) for rule in table
        }

    def state_dict(self, *args, **kwargs):
        return self.tensors


@pytest.fixture
def table(tiny, monkeypatch):
    """The tiny model's table of names, and an integer buffer."""
    table = [*rules(tiny()), COUNTS]
    monkeypatch.setattr(weights, "rules", lambda config: table)
    monkeypatch.setattr(optimizer_state, "rules", lambda config: table)
    return table


@pytest.fixture
def full(table):
    draw = torch.Generator().manual_seed(0)
    tensors = {rule.megatron: torch.randn(rule.shape, generator=draw) for rule in table}
    return {**tensors, COUNTS.megatron: torch.tensor([1, 2**40 + 1, -3, 0])}


def shard(full, table, rank, size):
    return {
        rule.megatron: split_shard(full[rule.megatron], rule.dim, rule.stride, rank, size).contiguous()
        for rule in table
    }


@pytest.fixture(autouse=True)
def folders(tmp_path):
    """The folders that the first rank makes before any rank writes."""
    for name in (weights.FOLDER, optimizer_state.FOLDER):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("current", [1, 2, 4])
def test_weights_of_any_size_load_at_any_size(tiny, tmp_path, table, full, saved, current):
    written_by, config = tiny({"parallel.tensor": saved}), tiny({"parallel.tensor": current})
    for rank in range(saved):
        weights.write_shard(tmp_path, shard(full, table, rank, saved), rank, saved)
    read = weights.read_weights(tmp_path, written_by)
    assert read.keys() == full.keys()
    assert all(torch.equal(read[name], full[name]) for name in full)
    assert read[COUNTS.megatron].dtype == torch.int64
    for rank in range(current):
        model, expected = Empty(table, rank, current), shard(full, table, rank, current)
        model.tensors[COUNTS.megatron] = torch.zeros(4, dtype=torch.int64)
        weights.load_into(model, config, tmp_path, written_by, rank)
        assert all(torch.equal(model.tensors[name], expected[name]) for name in full)


@pytest.mark.parametrize("tie", [True, False])
def test_padding_is_that_of_the_size_that_loads(tiny, tmp_path, tie):
    def config(tensor: int) -> Config:
        padding = -97 % tensor
        sizes = {"model.vocab_size": 97 + padding, "model.vocab_padding": padding, "parallel.tensor": tensor}
        return tiny(sizes | {"model.tie_word_embeddings": tie})

    draw = torch.Generator().manual_seed(0)
    unpadded = to_hf({rule.megatron: torch.randn(rule.shape, generator=draw) for rule in rules(config(1))}, config(1))
    for saved in (1, 2, 4):
        table, full = rules(config(saved)), from_hf(unpadded, config(saved))
        for rank in range(saved):
            weights.write_shard(tmp_path, shard(full, table, rank, saved), rank, saved)
        for current in (1, 2, 4):
            expected_full = from_hf(unpadded, config(current))
            for rank in range(current):
                model = Empty(rules(config(current)), rank, current)
                weights.load_into(model, config(current), tmp_path, config(saved), rank)
                expected = shard(expected_full, rules(config(current)), rank, current)
                assert all(torch.equal(model.tensors[name], tensor) for name, tensor in expected.items())


def test_load_into_names_a_missing_tensor(tiny, tmp_path, table, full):
    weights.write_shard(tmp_path, {name: full[name] for name in full if name != COUNTS.megatron}, 0, 1)
    with pytest.raises(UserError, match=r"holds no router\.counts\."):
        weights.load_into(Empty(table, 0, 1), tiny(), tmp_path, tiny(), 0)


@pytest.mark.parametrize(("saved", "replicas"), [(1, 1), (2, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("current", [1, 2, 4])
def test_optimizer_state_of_any_size_loads_at_any_size(tiny, tmp_path, table, full, saved, replicas, current):
    for rank in range(saved):
        state = [(f"exp_avg/{name}", part) for name, part in shard(full, table, rank, saved).items()]
        shares = [optimizer_state.shard(state, replica, replicas) for replica in range(replicas)]
        assert sorted(name for share in shares for name in share) == sorted(name for name, _ in state)
        largest = max(part.nbytes for _, part in state)
        sizes = [sum(part.nbytes for part in share.values()) for share in shares]
        assert max(sizes) - min(sizes) <= largest
        for replica, share in enumerate(shares):
            optimizer_state.write_shard(tmp_path, share, 7, (rank, saved, replica, replicas))
    for rank in range(current):
        expected = shard(full, table, rank, current)
        with optimizer_state.StoredState(tmp_path, tiny({"parallel.tensor": saved}), rank, current) as stored:
            assert stored.updates == 7
            assert all(torch.equal(stored.read("exp_avg", name), expected[name]) for name in full)


def test_shard_of_the_optimizer_state_is_a_copy():
    tensor = torch.ones(3)
    share = optimizer_state.shard([("a", tensor)], 0, 1)
    tensor.zero_()
    assert share["a"].tolist() == [1, 1, 1]
