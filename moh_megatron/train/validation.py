"""Computes the loss on held-out text, and lets the model continue a prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import mean_by_shares
from moh_megatron.data.batches import ValidationBatch, validation_batches
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.model.build import token_losses
from moh_megatron.model.generation import generate_tokens
from moh_megatron.parallel import groups
from moh_megatron.train.session import Session


@dataclass(frozen=True)
class Validation:
    """The result of one validation."""

    loss: float | None
    """Nats per token: the sources' losses, weighted by their shares of the step. None where no text is held out."""
    source_losses: dict[str, float]
    """The loss of each source."""
    sample: str
    """The first prompt of the configuration and what the model wrote after it."""


def validate(session: Session, step: int) -> Validation:
    """Validate the model after ``step``; every rank calls this and gets the same result."""
    config, model = session.config, session.engine.module
    losses: dict[str, float] = {}
    for name, dataset in session.validation_datasets.items():
        batches = validation_batches(
            dataset,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=groups.dp_group().rank(),
            data_parallel_size=groups.dp_group().size(),
        )
        losses[name] = validation_loss(model, batches, session.device, session.eos_token_id)
    sample = sample_text(model, config, session.tokenizer, session.device)
    return Validation(mean_by_shares(config, step, losses), losses, sample)


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[ValidationBatch], device: torch.device, eos_token_id: int | None = None
) -> float:
    """Mean cross-entropy in nats over every token that counts in ``batches``, over all data-parallel ranks.

    ``eos_token_id`` as in ``token_losses``.
    """
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        losses = token_losses(model, batch.tokens.to(device), eos_token_id)[: batch.samples]
        totals += torch.stack([losses.double().sum(), losses.new_tensor(losses.numel(), dtype=torch.float64)])
    model.train()
    dist.all_reduce(totals, group=groups.dp_group())
    return float(totals[0] / totals[1])


def sample_text(model: nn.Module, config: Config, tokenizer: Tokenizer, device: torch.device) -> str:
    """The first prompt of the configuration and what the model writes after it; the same on every rank."""
    prompt = config.generate.prompts[0] if config.generate.prompts else ""
    model.eval()
    written = generate_tokens(
        model,
        tokenizer.encode(prompt) or [tokenizer.eos_token_id],
        max_new_tokens=config.generate.max_new_tokens,
        temperature=config.generate.temperature,
        top_k=config.generate.top_k,
        stop_token=tokenizer.eos_token_id,
        context=config.train.sequence_length,
        seed=config.run.seed,
        device=device,
    )
    model.train()
    return prompt + tokenizer.decode(written)
