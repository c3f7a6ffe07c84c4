"""What a model consists of when it is saved: its parameters, and the routers' biases."""

from __future__ import annotations

from torch import Tensor, nn


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under Megatron-core's names, themselves and not copies."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
