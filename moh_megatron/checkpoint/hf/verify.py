"""Compares two forms of one model: hidden states layer by layer, logits, and next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault
from moh_megatron.model.build import position_ids
from moh_megatron.model.single import build_single_process, routing_margin

TOLERANCE = 1e-4
"""The logits must differ by less than this, times the largest absolute logit where that is above 1."""
SEQUENCES = 2
LONGEST_SEQUENCE = 256
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trace:
    """The output of each layer [B, S, D] and the logits [B, S, V] of one forward pass, in fp32."""

    layers: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """Largest and mean absolute difference of two tensors; NaN if a value is NaN."""

    name: str
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.name}: largest difference {self.largest:.3g}, mean {self.mean:.3g}"


@dataclass(frozen=True)
class Comparison:
    """The differences of two traces, layer by layer and of the logits."""

    layers: list[Difference]
    logits: Difference
    divergence: float
    """Mean KL divergence of the next-token distributions, in nats."""
    magnitude: float
    """The largest absolute logit."""
    margin: float = math.inf
    """The smallest distance of the routing from a tie; infinite in a dense model."""

    @property
    def allowed(self) -> float:
        """The logits of the same model differ by less than this."""
        return TOLERANCE * max(1.0, self.magnitude)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), f"{self.logits}, KL divergence {self.divergence:.3g} nats"])


def verification_tokens(config: Config, seed: int) -> Tensor:
    """Return random tokens [B, S] that depend on the seed alone."""
    shape = (SEQUENCES, min(LONGEST_SEQUENCE, config.train.sequence_length))
    return torch.randint(config.model.tokens, shape, generator=torch.Generator().manual_seed(seed))


def tokens_far_from_ties(model: nn.Module, config: Config) -> tuple[Tensor, float]:
    """Return the batch [B, S], of a few random ones, whose routing is farthest from a tie, and that distance.

    Two forms of a model round differently in the last place, so a token whose best two heads are nearly
    equal may choose another head.
    """
    batches = [verification_tokens(config, seed) for seed in SEEDS]
    return max(((batch, routing_margin(model, batch)) for batch in batches), key=lambda candidate: candidate[1])


@torch.inference_mode()
def _trace(layers: Iterable[nn.Module], forward: Callable[[], Tensor], transposed: bool) -> Trace:
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append((hidden.transpose(0, 1) if transposed else hidden).float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    logits = forward().float()
    for hook in hooks:
        hook.remove()
    return Trace(outputs, logits)


def trace_megatron(model: Any, config: Config, tokens: Tensor) -> Trace:
    """Trace a model of ``build_single_process``; columns of padding are dropped."""
    trace = _trace(model.decoder.layers, lambda: model(tokens, position_ids(tokens), None), transposed=True)
    return Trace(trace.layers, trace.logits[..., : config.model.tokens])


def trace_hf(model: Any, tokens: Tensor) -> Trace:
    """Trace a LLaMA of transformers, or one of our exports."""
    return _trace(model.model.layers, lambda: model(tokens, use_cache=False).logits, transposed=False)


def compare_forms(config: Config, weights: Mapping[str, Tensor], reopen: Callable[[], PreTrainedModel]) -> Comparison:
    """Compare a checkpoint's ``weights`` in fp32 with the model that ``reopen`` returns; one is in memory at a time."""
    model = build_single_process(config, weights)
    tokens, margin = tokens_far_from_ties(model, config)
    ours = trace_megatron(model, config, tokens)
    del model
    return replace(compare(ours, trace_hf(reopen(), tokens)), margin=margin)


def require_agreement(comparison: Comparison, what: str) -> None:
    """Raise Fault, with a message that begins with ``what``, unless the logits differ by less than allowed."""
    largest = comparison.logits.largest
    if not largest < comparison.allowed:
        tie = ""
        if math.isfinite(comparison.margin):
            tie = f", unless rounding chose another head: the nearest two were {comparison.margin:.1g} apart"
        raise Fault(
            f"{what} by {largest:.3g}; less than {comparison.allowed:.3g} is required. Nothing was written. This is a "
            f"bug{tie}. Please report it."
        )


@torch.inference_mode()
def compare(ours: Trace, theirs: Trace) -> Comparison:
    """Compare two traces of the same tokens."""
    layers = [
        _difference(f"layer {index}", *pair) for index, pair in enumerate(zip(ours.layers, theirs.layers, strict=True))
    ]
    # In fp32 the divergence of equal models would be rounding noise of either sign.
    left, right = (trace.logits.double().log_softmax(-1) for trace in (ours, theirs))
    divergence = F.kl_div(right, left, log_target=True, reduction="none").sum(-1).mean().item()
    magnitude = ours.logits[ours.logits.isfinite()].abs().max().item()
    return Comparison(layers, _difference("logits", ours.logits, theirs.logits), divergence, magnitude)


def _difference(name: str, left: Tensor, right: Tensor) -> Difference:
    difference = (left - right).abs()
    return Difference(name, difference.max().item(), difference.mean().item())
