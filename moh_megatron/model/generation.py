"""Generates tokens with a Megatron-core model, without a KV cache; every tensor-parallel rank takes part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moh_megatron.model.build import position_ids
from moh_megatron.parallel import groups
from moh_megatron.parallel.gradients import gather_last_dimension


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token from logits [V]: the most likely at temperature 0, else drawn from the ``top_k`` most likely or all."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu() / temperature
    if top_k is not None and top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


@torch.no_grad()
def generate_tokens(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    stop_token: int,
    context: int,
    seed: int,
    device: torch.device,
) -> list[int]:
    """The tokens that follow ``prompt`` (at least one token), up to and without ``stop_token``.

    ``model`` is in evaluation mode and sees at most the last ``context`` tokens. All tensor-parallel ranks call this
    and draw the same tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    group = groups.tp_group()
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = tokens[-context:]
        # Sequence parallelism needs a divisible length; causal attention ignores the padding after the last token.
        padding = -len(window) % group.size()
        ids = torch.tensor([window + [stop_token] * padding], device=device)
        last = model(ids, position_ids(ids), None)[:, len(window) - 1].contiguous()
        logits = gather_last_dimension(last, group)[0]
        token = sample_token(logits, temperature, top_k, generator)
        if token == stop_token:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
