"""Rows of the embedding that are no tokens get no probability."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from moh_megatron.parallel import groups


def mask_padding(output_layer: nn.Module, tokens: int) -> None:
    """Make ``output_layer``'s logits from the column ``tokens`` on minus infinity, whichever rank has them."""

    def mask(layer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        width = logits.shape[-1]
        columns = torch.arange(width, device=logits.device) + groups.tp_group().rank() * width
        return logits.masked_fill(columns >= tokens, -torch.inf), bias

    output_layer.register_forward_hook(mask)
