"""Documents packed into sequences: where each ends, and the positions of its tokens.

A document ends with its end-of-document token, which belongs to it, and at the end of a row.
Legend: S sequence, B batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_ends(tokens: Tensor, eos_token_id: int) -> Tensor:
    """cu_seqlens, int32 [documents + 1], of tokens [B, S] with the rows one behind the other.

    On the CPU: attention reads the numbers in every layer, and a GPU would have to wait for each reading.
    """
    last = tokens == eos_token_id
    last[:, -1:] = True
    return F.pad(last.flatten().nonzero().flatten() + 1, (1, 0)).to("cpu", torch.int32)


def document_positions(tokens: Tensor, eos_token_id: int) -> Tensor:
    """[B, S] position of each token of tokens [B, S] in its document, from 0."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    follows_an_end = F.pad(tokens == eos_token_id, (1, 0))[:, :-1]
    return positions - (positions * follows_an_end).cummax(1).values
