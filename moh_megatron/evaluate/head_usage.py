"""Measures which heads a model uses for a text, layer by layer, and how similar the outputs of the heads are.

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
from moh_megatron.data.prepare.chunks import Chunk
from moh_megatron.data.prepare.inputs import Segment, find_inputs
from moh_megatron.data.prepare.read_documents import read_segment
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel
from moh_megatron.io.errors import UserError
from moh_megatron.moh.routing import Routing


@dataclass(frozen=True)
class HeadUsage:
    """Load and similarity of the heads over one text."""

    tokens: int
    load: Tensor
    """[L, N] share of the tokens that used each head."""
    similarity: Tensor
    """[L, N, N] mean cosine of two heads' outputs over the tokens that used both; NaN where none did."""


def measure_head_usage(loaded: LoadedModel, text: str, sequence_length: int, sequences: int) -> HeadUsage:
    """Measure the heads on the first ``sequences`` sequences of ``text``.

    Raises UserError where the text is shorter than one sequence.
    """
    ids = load_tokenizer(loaded.tokenizer_dir).encode(text)
    length = min(sequence_length, loaded.context)
    count = min(sequences, len(ids) // length)
    if count == 0:
        raise UserError(f"The text must have at least {length} tokens. Got {len(ids)}; name a longer one.")
    layers = _attention_layers(loaded)
    uses = [torch.zeros(0)] * len(layers)
    cosines = [torch.zeros(0)] * len(layers)
    joint_uses = [torch.zeros(0)] * len(layers)

    def add(layer: int, outputs: Tensor, active: Tensor) -> None:
        """Add the counts and cosines of outputs [tokens, N, H] and active heads [tokens, N]."""
        unit = torch.nn.functional.normalize(outputs.float(), dim=-1) * active.unsqueeze(-1)
        counted = active.double()
        for sums, values in (
            (uses, counted.sum(0)),
            (cosines, torch.einsum("tnh,tmh->nm", unit, unit).double()),
            (joint_uses, counted.t() @ counted),
        ):
            sums[layer] = values if not sums[layer].numel() else sums[layer] + values

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(layer.observed(lambda outputs, active, index=index: add(index, outputs, active)))
        for start in range(0, count * length, length):
            loaded.logits(torch.tensor([ids[start : start + length]]))
    pairs = torch.stack(joint_uses)
    similarity = torch.stack(cosines) / pairs.masked_fill(pairs == 0, torch.nan)
    return HeadUsage(count * length, torch.stack(uses) / (count * length), similarity)


@dataclass(frozen=True)
class _AttentionLayer:
    """One attention layer of a checkpoint's model or of an exported one."""

    projection: nn.Module
    """The output projection; its input is the concatenation of the heads' outputs."""
    router: nn.Module | None
    positions: tuple[int, ...]
    """The position of each logical head in the projection's input."""

    @contextmanager
    def observed(self, observe: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """Give ``observe`` the outputs [tokens, N, H] and the active heads [tokens, N] of each forward pass.

        The outputs are multiplied by their gates, which are positive and do not change a cosine.
        """
        active_heads: list[Tensor] = []

        def record_routing(module: nn.Module, inputs: Any, output: Any) -> None:
            active_heads.append(_active(output))

        def record_outputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            flat = inputs[0].flatten(0, 1).cpu()
            outputs = flat.unflatten(-1, (len(self.positions), -1))[:, list(self.positions)]
            observe(outputs, active_heads.pop() if active_heads else torch.ones(outputs.shape[:2], dtype=torch.bool))

        hooks = [self.projection.register_forward_pre_hook(record_outputs)]
        if self.router is not None:
            hooks.append(self.router.register_forward_hook(record_routing))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _attention_layers(loaded: LoadedModel) -> list[_AttentionLayer]:
    if loaded.config is not None:
        model, moh = loaded.config.model, loaded.config.moh
        layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
        name, positions = "linear_proj", tuple(inverse(layout.head_order))
    else:
        config: Any = loaded.model.config
        name, positions = "o_proj", tuple(range(config.num_attention_heads))
    modules: list[Any] = [
        module for module in loaded.model.modules() if isinstance(getattr(module, name, None), nn.Module)
    ]
    if not modules:
        raise UserError(f"{loaded.path}: no attention layers were found; only LLaMA-like models can be looked into.")
    return [_AttentionLayer(getattr(module, name), getattr(module, "router", None), positions) for module in modules]


def _active(routed: Any) -> Tensor:
    """A router's output -> [tokens, N] bool. Our router returns the active heads, an exported one only their gates."""
    active = routed.active if isinstance(routed, Routing) else routed > 0
    return active.flatten(0, 1).cpu()


def read_text(path: str, characters: int) -> str:
    """The first ``characters`` of a file that moh-prepare can read, with a blank line between documents.

    Raises UserError where it cannot be read.
    """
    parts: list[str] = []
    missing = characters
    for source in find_inputs([path]):
        for event in read_segment(source, Segment(0, 0, None, source.bytes), DataConfig(), lambda position: None):
            if isinstance(event, Chunk):
                parts.append(event.text[:missing] + ("\n\n" if event.last else ""))
                missing -= len(parts[-1])
            if missing <= 0:
                return "".join(parts)
    return "".join(parts)
