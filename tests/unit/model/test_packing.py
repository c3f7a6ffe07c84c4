"""Documents packed into batch rows: their ends, positions, and a model that keeps attention inside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moh_megatron.data.batches import ValidationBatch
from moh_megatron.model.attention_backend import attention_backend
from moh_megatron.model.build import build_model, token_losses
from moh_megatron.model.packing import PackedGPTModel, document_ends, document_positions
from moh_megatron.train.validation import validation_loss

END = 7
VOCABULARY = 96
ROWS = [[11, 5], [4, 1, 1, 8, 2]]
"""Lengths of the documents in each row; one consists of its end token only."""


pytestmark = pytest.mark.usefixtures("one_rank")


def packed() -> Tensor:
    """[B, S + 1] tokens of ROWS; each document except the last of a row ends with END."""
    tokens = torch.randint(END + 1, VOCABULARY, (len(ROWS), 17), generator=torch.Generator().manual_seed(3))
    for row, lengths in zip(tokens, ROWS, strict=True):
        row[torch.tensor(lengths).cumsum(0)[:-1] - 1] = END
    return tokens


@given(
    rows=st.integers(0, 4).flatmap(
        lambda length: st.lists(st.lists(st.integers(0, 2), min_size=length, max_size=length), min_size=1, max_size=3)
    )
)
def test_document_ends_and_positions_equal_a_loop_over_tokens(rows: list[list[int]]) -> None:
    tokens, ends, positions = torch.tensor(rows, dtype=torch.int64), [0], []
    for row in rows:
        position = 0
        for index, token in enumerate(row):
            positions.append(position)
            ended = token == 0 or index == len(row) - 1
            position = 0 if ended else position + 1
            if ended:
                ends.append(len(positions))
    got = document_ends(tokens, 0)
    assert got.dtype == torch.int32
    assert got.tolist() == ends
    assert document_positions(tokens, 0).shape == tokens.shape
    assert document_positions(tokens, 0).flatten().tolist() == positions


def test_end_of_document_token_belongs_to_its_document() -> None:
    tokens = torch.tensor([[5, 0, 0, 6, 6], [0, 5, 5, 5, 0]])
    assert document_ends(tokens, 0).tolist() == [0, 2, 3, 5, 6, 10]
    assert document_positions(tokens, 0).tolist() == [[0, 1, 0, 0, 1], [0, 0, 1, 2, 3]]


def separate_and_packed(model: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The losses [B * S] of ``packed()``, computed for each document separately, and for all together."""
    tokens, losses = packed(), []
    for row, lengths in zip(tokens, ROWS, strict=True):
        start = 0
        for length in lengths:
            # The target of a document's end token is the first token of the next document.
            losses.append(token_losses(model, row[None, start : start + length + 1])[0])
            start += length
    return torch.cat(losses), token_losses(model, tokens, END).flatten()


def gradients(model: torch.nn.Module, losses: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(losses.mean(), list(model.parameters())))


@pytest.mark.parametrize(
    "moh",
    [
        {"enabled": False},
        {"backend": "dense"},
        {"backend": "gathered"},
        {"backend": "cpu"},
        {"router": "query_norm", "backend": "cpu"},
    ],
)
def test_packed_documents_give_losses_and_gradients_of_separate_ones(tiny: Any, moh: dict[str, Any]) -> None:
    changes = {f"moh.{name}": value for name, value in moh.items()}
    # The balance loss is a mean over the batch, not a sum over documents.
    config = tiny({"data.document_mask": True, "moh.balance_coefficient": 0.0, "model.init_method_std": 0.1, **changes})
    torch.manual_seed(4)
    model = build_model(config)
    separate, together = separate_and_packed(model)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=0)
    for (name, _), a, b in zip(
        model.named_parameters(), gradients(model, together), gradients(model, separate), strict=True
    ):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name
    across = token_losses(model, packed()).flatten()
    first = ROWS[0][0]
    torch.testing.assert_close(across[:first], together[:first])
    assert float((across - together).abs().max()) > 1e-3


def test_model_without_documents_equals_megatrons(tiny: Any) -> None:
    def losses(**changes: bool) -> Tensor:
        torch.manual_seed(4)
        return token_losses(build_model(tiny({f"data.{name}": value for name, value in changes.items()})), packed())

    assert torch.equal(losses(document_mask=True), losses())
    assert type(build_model(tiny(None))) is not PackedGPTModel


def test_validation_loss_respects_documents(tiny: Any) -> None:
    model = build_model(tiny({"data.document_mask": True, "model.init_method_std": 0.1}))
    _, together = separate_and_packed(model)
    got = validation_loss(model, [ValidationBatch(packed(), 2)], torch.device("cpu"), END)
    assert got == pytest.approx(float(together.mean()), rel=1e-6)


def test_reported_backend_mentions_documents(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    changes = {"data.document_mask": True, "train.sequence_length": 512}
    cpu = torch.device("cpu")
    assert attention_backend(tiny(changes), cpu) == "cpu, dense where documents are short"
    assert attention_backend(tiny({**changes, "moh.backend": "cpu"}), cpu) == "cpu"
    assert attention_backend(tiny({**changes, "moh.active_heads": 8}), cpu) == "dense"
