"""Megatron-core's GPTModel with rotary positions as given: its own are 0 to S - 1, whatever ``position_ids`` says."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor


class PackedGPTModel(GPTModel):
    """A GPTModel whose RoPE follows ``position_ids`` [B, S], which may restart at each packed document."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        prepared: tuple[Any, ...] = super()._preprocess(input_ids, position_ids, *arguments, **options)
        hidden_states, angles, *others = prepared
        # [S, 1, 1, H] for all rows -> [S, B, 1, H], one for each: it broadcasts over the heads as before.
        return hidden_states, angles[:, 0][position_ids.t()], *others
