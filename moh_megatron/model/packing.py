"""Documents packed into one sequence: where each ends, the positions of its tokens, and a model that follows them.

A document ends with its end-of-document token, which belongs to it, or at the end of a batch row.
Legend: S sequence, B batch, H head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


def document_ends(tokens: Tensor, eos_token_id: int) -> Tensor:
    """cu_seqlens, int32 [documents + 1], of tokens [B, S] with the batch rows concatenated.

    The result is on the CPU: attention reads it in every layer, and each read from a GPU would be a synchronisation.
    """
    ends = tokens == eos_token_id
    ends[:, -1:] = True
    return F.pad(ends.flatten().nonzero().flatten() + 1, (1, 0)).to("cpu", torch.int32)


def document_positions(tokens: Tensor, eos_token_id: int) -> Tensor:
    """[B, S]: the position of each token of tokens [B, S] in its document, from 0."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    starts_document = F.pad(tokens == eos_token_id, (1, 0))[:, :-1]
    return positions - (positions * starts_document).cummax(1).values


class PackedGPTModel(GPTModel):
    """A GPTModel whose RoPE follows ``position_ids`` [B, S], which may restart at each packed document.

    Megatron-core's own RoPE counts from 0 to S - 1 whatever ``position_ids`` holds.
    """

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = super()._preprocess(input_ids, position_ids, *arguments, **options)
        hidden_states, angles, *others = prepared
        # One set of angles [S, 1, 1, H] for all batch rows becomes one for each row, [S, B, 1, H].
        return hidden_states, angles[:, 0][position_ids.t()], *others
