"""Measures loss and KL divergence of MoH models against the dense model they were made of, document by document."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.io.console import progress_bar
from moh_megatron.model.build import moh_layers
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.model.tensors import model_tensors
from moh_megatron.upcycle.routers import initial_routers


@dataclass(frozen=True)
class Mean:
    """A mean over documents of equal weight, and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


def mean(values: Sequence[float]) -> Mean:
    """The mean of the values of two or more documents."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return Mean(float(numbers.mean()), float(numbers.std()) / math.sqrt(len(values)))


def recovered_share(upcycled: Sequence[float], tuned: Sequence[float], tuned_dense: Sequence[float]) -> Mean:
    """(upcycled - tuned) / (upcycled - tuned dense), of mean losses over the same documents.

    The standard error is that of a ratio by the delta method, because the three losses are correlated over documents.
    """
    before, after, dense = (torch.tensor(losses, dtype=torch.float64) for losses in (upcycled, tuned, tuned_dense))
    gained, lost = before - after, before - dense
    share = float(gained.mean() / lost.mean())
    spread = float((gained - share * lost).std()) / math.sqrt(len(upcycled))
    return Mean(share, spread / abs(float(lost.mean())))


def without_moh(config: Config) -> Config:
    """``config`` with moh.enabled: false."""
    return dataclasses.replace(config, moh=dataclasses.replace(config.moh, enabled=False))


def with_routers(config: Config, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights ``dense`` of a dense model and new routers, under Megatron-core's names."""
    names = {rule.hf[0]: rule.megatron for rule in rules(config)}
    return {**dense, **{names[name]: tensor for name, tensor in initial_routers(config)}}


def upcycled_model(config: Config, dense: nn.Module) -> nn.Module:
    """The MoH model of ``config`` that shares its weights with ``dense``, a dense model in this single process."""
    shared = model_tensors(dense)
    weights = with_routers(config, {name: tensor.detach() for name, tensor in shared.items()})
    model = build_single_process(config, weights)
    model.to(next(dense.parameters()).device)
    for name, tensor in model_tensors(model).items():
        if name in shared:
            tensor.data = shared[name].data
    return model


def set_active_heads(model: nn.Module, active: int) -> None:
    """Let every layer of ``model`` use ``active`` heads, shared ones included, equally many in each routing group."""
    for layer in moh_layers(model):
        heads = layer.router.heads
        assert active % heads.groups == 0, "budgets that do not divide evenly are left out of the plan"
        layer.router.top_k = active - len(heads.shared)


@dataclass(frozen=True)
class DocumentValues:
    """Values of one model for each document, in nats a token."""

    losses: list[float]
    divergences: list[float]
    """KL(dense || model)."""


@torch.inference_mode()
def document_losses(model: nn.Module, documents: Sequence[Tensor]) -> list[float]:
    """Mean cross-entropy of each document [T + 1]."""
    device = next(model.parameters()).device
    losses = []
    with progress_bar("documents", len(documents), "document") as bar:
        for document in documents:
            tokens = document.to(device)
            losses.append(float(F.cross_entropy(logits(model, tokens[None, :-1])[0], tokens[1:])))
            bar.update()
    return losses


@torch.inference_mode()
def measure_loss_and_kl(
    dense: nn.Module, variants: Mapping[str, tuple[nn.Module, int]], documents: Sequence[Tensor]
) -> tuple[list[float], dict[str, DocumentValues]]:
    """Losses of ``dense`` on documents [T + 1], and loss and KL of each variant: a MoH model and its active heads."""
    device = next(dense.parameters()).device
    dense_losses: list[float] = []
    values = {name: DocumentValues([], []) for name in variants}
    with progress_bar("documents", len(documents), "document") as bar:
        for document in documents:
            inputs, labels = document[None, :-1].to(device), document[1:].to(device)
            dense_log_probs = logits(dense, inputs)[0].log_softmax(-1)
            dense_losses.append(float(F.nll_loss(dense_log_probs, labels)))
            for name, (model, active) in variants.items():
                set_active_heads(model, active)
                log_probs = logits(model, inputs)[0].log_softmax(-1)
                values[name].losses.append(float(F.nll_loss(log_probs, labels)))
                values[name].divergences.append(float(kl_divergence(dense_log_probs, log_probs)))
            bar.update()
    return dense_losses, values


def kl_divergence(target: Tensor, log_probs: Tensor) -> Tensor:
    """Mean KL(target || model) of log-probabilities [T, V], computed in float64: fp32 would round small values away."""
    values = F.kl_div(log_probs.double(), target.double(), log_target=True, reduction="none")
    return values.nan_to_num(0.0).sum(-1).mean()
