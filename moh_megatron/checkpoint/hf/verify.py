"""Two forms of one model side by side: hidden states layer by layer, logits, and what a sampler would notice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from moh_megatron.checkpoint.hf.hf_config import hf_config
from moh_megatron.checkpoint.hf.hf_config_reader import HFSettings
from moh_megatron.checkpoint.hf.hf_extras import Ends
from moh_megatron.checkpoint.hf.hf_model.modeling_moh import MoHForCausalLM
from moh_megatron.checkpoint.hf.hf_reader import check_index
from moh_megatron.checkpoint.hf.transformers_io import quiet, refusing
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault
from moh_megatron.model.build import position_ids
from moh_megatron.model.single import build_single_process, routing_margin

TOLERANCE = 1e-4
"""Largest difference of logits that rounding may make, of logits up to 1; in proportion where they are larger."""
SEQUENCES = 2
LONGEST_SEQUENCE = 256
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trace:
    """What a model computed: each layer's output [B, S, D], and logits [B, S, V], in fp32."""

    layers: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """Largest and mean absolute difference of one kind of value; NaN where a value is NaN."""

    name: str
    largest: float
    mean: float

    def __str__(self) -> str:
        return f"{self.name}: largest difference {self.largest:.3g}, mean {self.mean:.3g}"


@dataclass(frozen=True)
class Comparison:
    """Layer by layer and in the end."""

    layers: list[Difference]
    logits: Difference
    divergence: float
    """Mean KL divergence of the next token's distributions, nats."""
    magnitude: float
    """The largest absolute logit."""
    margin: float = math.inf
    """How far the routing was from a tie; infinite in a dense model."""

    @property
    def allowed(self) -> float:
        """The difference of the logits from which on the two are not the same model."""
        return TOLERANCE * max(1.0, self.magnitude)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.layers), f"{self.logits}, KL divergence {self.divergence:.3g} nats"])


def verification_tokens(config: Config, seed: int) -> Tensor:
    """Random tokens [B, S], the same for the same seed."""
    shape = (SEQUENCES, min(LONGEST_SEQUENCE, config.train.sequence_length))
    return torch.randint(config.model.tokens, shape, generator=torch.Generator().manual_seed(seed))


def tokens_far_from_ties(model: nn.Module, config: Config) -> tuple[Tensor, float]:
    """Of a few batches [B, S] of random tokens the one whose routing is farthest from a tie, and how far.

    Rounding differs between two forms in the last place, and a token whose next-best head is nearly as good may then
    choose another head.
    """
    batches = [verification_tokens(config, seed) for seed in SEEDS]
    return max(((batch, routing_margin(model, batch)) for batch in batches), key=lambda each: each[1])


@torch.inference_mode()
def _trace(layers: Iterable[nn.Module], run: Any, turned: bool) -> Trace:
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append((hidden.transpose(0, 1) if turned else hidden).float())

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    logits = run().float()
    for hook in hooks:
        hook.remove()
    return Trace(seen, logits)


def trace_megatron(model: Any, config: Config, tokens: Tensor) -> Trace:
    """Of a ``build_single_process`` model; columns of padding are left out."""
    found = _trace(model.decoder.layers, lambda: model(tokens, position_ids(tokens), None), turned=True)
    return Trace(found.layers, found.logits[..., : config.model.tokens])


def trace_hf(model: Any, tokens: Tensor) -> Trace:
    """Of a LLaMA of transformers, or one of our exports."""
    return _trace(model.model.layers, lambda: model(tokens, use_cache=False).logits, turned=False)


def open_export(folder: Path) -> PreTrainedModel:
    """A folder of our making, in fp32, with the code in it."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def open_foreign(folder: Path, config: Config) -> PreTrainedModel:
    """Any folder in fp32, by code that is not the folder's; Transformers reads its config.json, for a second opinion.

    The official form does not say how its heads are routed: it is computed as ``config`` says.

    Raises:
        UserError: Transformers does not open it, though its weights and settings were read.
    """
    check_index(folder)
    model_class = MoHForCausalLM if config.moh.enabled else LlamaForCausalLM
    silent = config.moh.enabled and not HFSettings(folder).moh
    settings = hf_config(config, torch.float32, Ends()) if silent else None
    with quiet(), refusing(folder, "a model"):
        return model_class.from_pretrained(folder, config=settings, dtype=torch.float32).eval()


def compare_forms(config: Config, weights: Mapping[str, Tensor], reopen: Callable[[], PreTrainedModel]) -> Comparison:
    """A checkpoint's ``weights`` in fp32 against the model that ``reopen`` gives, one after the other in memory."""
    model = build_single_process(config, weights)
    tokens, margin = tokens_far_from_ties(model, config)
    ours = trace_megatron(model, config, tokens)
    del model
    return replace(compare(ours, trace_hf(reopen(), tokens)), margin=margin)


def require_agreement(comparison: Comparison, what: str) -> None:
    """Raise Fault, which begins with ``what``, where the logits differ by what ``Comparison`` allows, or more."""
    largest = comparison.logits.largest
    if not largest < comparison.allowed:
        tied = f", unless rounding chose another head: the nearest two were {comparison.margin:.1g} apart"
        tie = tied if math.isfinite(comparison.margin) else ""
        raise Fault(
            f"{what} by {largest:.3g}; less than {comparison.allowed:.3g} is required. Nothing was written. This is a "
            f"bug{tie}. Please report it."
        )


@torch.inference_mode()
def compare(ours: Trace, theirs: Trace) -> Comparison:
    """How far apart two traces of the same tokens are."""
    layers = [
        _difference(f"layer {index}", *pair) for index, pair in enumerate(zip(ours.layers, theirs.layers, strict=True))
    ]
    # In fp32 the rounding of equal ones is all there would be, and of either sign.
    left, right = (each.logits.double().log_softmax(-1) for each in (ours, theirs))
    divergence = F.kl_div(right, left, log_target=True, reduction="none").sum(-1).mean().item()
    magnitude = ours.logits[ours.logits.isfinite()].abs().max().item()
    return Comparison(layers, _difference("logits", ours.logits, theirs.logits), divergence, magnitude)


def _difference(name: str, left: Tensor, right: Tensor) -> Difference:
    apart = (left - right).abs()
    return Difference(name, apart.max().item(), apart.mean().item())
