"""Which heads a model uses for which texts, layer by layer, and how alike the heads' outputs are.

Legend: L layers, N query heads (logical numbers), B batch, S sequence, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moh_megatron.config.head_layout import HeadLayout, inverse
from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare.inputs import Segment, find_inputs
from moh_megatron.data.prepare.pieces import Piece
from moh_megatron.data.prepare.read_documents import read_segment
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel
from moh_megatron.io.errors import UserError
from moh_megatron.moh.routing import Routing


@dataclass(frozen=True)
class HeadStudy:
    """Of one text."""

    tokens: int
    load: Tensor
    """[L, N] share of the tokens that used each head."""
    similarity: Tensor
    """[L, N, N] mean cosine of two heads' outputs over the tokens that used both; NaN where none did."""


def study(subject: LoadedModel, text: str, sequence_length: int, sequences: int) -> HeadStudy:
    """The first ``sequences`` stretches of ``text``. Raises UserError where it is shorter than one."""
    ids = load_tokenizer(subject.tokenizer_dir).encode(text)
    length = min(sequence_length, subject.context)
    count = min(sequences, len(ids) // length)
    if count == 0:
        raise UserError(f"The text must have at least {length} tokens. Got {len(ids)}; name a longer one.")
    layers = _layers(subject)
    used = [torch.zeros(0)] * len(layers)
    alike = [torch.zeros(0)] * len(layers)
    together = [torch.zeros(0)] * len(layers)

    def add(layer: int, outputs: Tensor, active: Tensor) -> None:
        """[tokens, N, H], [tokens, N]"""
        unit = torch.nn.functional.normalize(outputs.float(), dim=-1) * active.unsqueeze(-1)
        chosen = active.double()
        for sums, values in (
            (used, chosen.sum(0)),
            (alike, torch.einsum("tnh,tmh->nm", unit, unit).double()),
            (together, chosen.t() @ chosen),
        ):
            sums[layer] = values if not sums[layer].numel() else sums[layer] + values

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(layer.watched(lambda out, active, number=number: add(number, out, active)))
        for start in range(0, count * length, length):
            subject.logits(torch.tensor([ids[start : start + length]]))
    pairs = torch.stack(together)
    similarity = torch.stack(alike) / pairs.masked_fill(pairs == 0, torch.nan)
    return HeadStudy(count * length, torch.stack(used) / (count * length), similarity)


@dataclass(frozen=True)
class _Layer:
    """One attention layer of either kind of model."""

    projection: nn.Module
    """What mixes the heads' outputs; its input is they, one behind the other."""
    router: nn.Module | None
    place: tuple[int, ...]
    """Where each logical head lies in the projection's input."""

    @contextmanager
    def watched(self, tell: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Each forward pass tells outputs [tokens, N, H] (times their gates, which are positive) and which count."""
        decided: list[Tensor] = []

        def remember(module: nn.Module, inputs: Any, output: Any) -> None:
            decided.append(_active(output))

        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].flatten(0, 1).cpu()
            outputs = flat.unflatten(-1, (len(self.place), -1))[:, list(self.place)]
            tell(outputs, decided.pop() if decided else torch.ones(outputs.shape[:2], dtype=torch.bool))

        hooks = [self.projection.register_forward_pre_hook(look)]
        if self.router is not None:
            hooks.append(self.router.register_forward_hook(remember))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _layers(subject: LoadedModel) -> list[_Layer]:
    if subject.config is not None:
        model, moh = subject.config.model, subject.config.moh
        layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
        name, place = "linear_proj", tuple(inverse(layout.head_order))
    else:
        config: Any = subject.model.config
        name, place = "o_proj", tuple(range(config.num_attention_heads))
    modules: list[Any] = [each for each in subject.model.modules() if isinstance(getattr(each, name, None), nn.Module)]
    if not modules:
        raise UserError(f"{subject.path}: no attention layers were found; only LLaMA-like models can be looked into.")
    return [_Layer(getattr(each, name), getattr(each, "router", None), place) for each in modules]


def _active(routed: Any) -> Tensor:
    """What a router gave -> [tokens, N] bool: our own says which heads are active, an exported one only their gates."""
    active = routed.active if isinstance(routed, Routing) else routed > 0
    return active.flatten(0, 1).cpu()


def read_text(path: str, characters: int) -> str:
    """The first ``characters`` of a file of any kind prepare_data reads, documents set apart by a blank line.

    Raises UserError where it cannot be read.
    """
    parts: list[str] = []
    missing = characters
    for source in find_inputs([path]):
        for event in read_segment(source, Segment(0, 0, None, source.bytes), DataConfig(), lambda position: None):
            if isinstance(event, Piece):
                parts.append(event.text[:missing] + ("\n\n" if event.last else ""))
                missing -= len(parts[-1])
            if missing <= 0:
                return "".join(parts)
    return "".join(parts)
