"""A MoH model beside the dense model it came from: loss and KL divergence, document by document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.model.build import moh_layers
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.routers import initial_routers


@dataclass(frozen=True)
class Mean:
    """Over documents, each of equal weight."""

    value: float
    error: float
    """Standard error."""

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def mean(values: Sequence[float]) -> Mean:
    """Of two or more documents."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return Mean(float(numbers.mean()), float(numbers.std()) / math.sqrt(len(values)))


def recovered(upcycled: Sequence[float], tuned: Sequence[float], tuned_dense: Sequence[float]) -> Mean:
    """(upcycled - tuned) / (upcycled - tuned dense), of mean losses over the same documents.

    The error is a ratio's, by its linear part (delta method): documents move all three losses together.
    """
    start, end, dense = (torch.tensor(each, dtype=torch.float64) for each in (upcycled, tuned, tuned_dense))
    gained, lost = start - end, start - dense
    share = float(gained.mean() / lost.mean())
    spread = float((gained - share * lost).std()) / math.sqrt(len(upcycled))
    return Mean(share, spread / abs(float(lost.mean())))


def dense_twin(config: Config) -> Config:
    """``config`` without MoH."""
    return dataclasses.replace(config, moh=dataclasses.replace(config.moh, enabled=False))


def with_routers(config: Config, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a dense model and new routers, under Megatron-core's names."""
    names = {rule.hf[0]: rule.megatron for rule in rules(config)}
    return {**dense, **{names[name]: tensor for name, tensor in initial_routers(config)}}


def upcycled(config: Config, dense: nn.Module) -> nn.Module:
    """The MoH model of ``config`` over the very weights of ``dense``, a model of this one process."""
    held = model_tensors(dense)
    model = build_single_process(config, with_routers(config, {name: each.detach() for name, each in held.items()}))
    model.to(next(dense.parameters()).device)
    for name, tensor in model_tensors(model).items():
        if name in held:
            tensor.data = held[name].data
    return model


def use_heads(model: nn.Module, active: int) -> None:
    """Let every layer of ``model`` use so many heads, the shared ones included."""
    for layer in moh_layers(model):
        layer.router.top_k = active - len(layer.router.heads.shared)


@dataclass(frozen=True)
class Measured:
    """By document, nats a token."""

    losses: list[float]
    divergences: list[float]
    """KL(dense || model)."""


@torch.inference_mode()
def document_losses(model: nn.Module, documents: Sequence[Tensor]) -> list[float]:
    """Mean cross-entropy of each of the documents [T + 1]."""
    device = next(model.parameters()).device
    losses = []
    for document in tqdm(documents, desc="documents", dynamic_ncols=True):
        tokens = document.to(device)
        losses.append(float(F.cross_entropy(logits(model, tokens[None, :-1])[0], tokens[1:])))
    return losses


@torch.inference_mode()
def measure(
    dense: nn.Module, variants: Mapping[str, tuple[nn.Module, int]], documents: Sequence[Tensor]
) -> tuple[list[float], dict[str, Measured]]:
    """The losses of ``dense`` on documents [T + 1], and what each variant, a MoH model and its active heads, makes."""
    device = next(dense.parameters()).device
    losses: list[float] = []
    found = {name: Measured([], []) for name in variants}
    for document in tqdm(documents, desc="documents", dynamic_ncols=True):
        inputs, labels = document[None, :-1].to(device), document[1:].to(device)
        wanted = logits(dense, inputs)[0].log_softmax(-1)
        losses.append(float(F.nll_loss(wanted, labels)))
        for name, (model, active) in variants.items():
            use_heads(model, active)
            here = logits(model, inputs)[0].log_softmax(-1)
            found[name].losses.append(float(F.nll_loss(here, labels)))
            found[name].divergences.append(float(divergence(wanted, here)))
    return losses, found


def divergence(wanted: Tensor, here: Tensor) -> Tensor:
    """Mean KL of log-probabilities [T, V]; in float64, because in fp32 the rounding of equal ones is all there is."""
    return F.kl_div(here.double(), wanted.double(), log_target=True, reduction="none").nan_to_num(0.0).sum(-1).mean()
