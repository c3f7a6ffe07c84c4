"""What a run says of its heads before the first step."""

from __future__ import annotations

import itertools
import textwrap

from moh_megatron.config.head_layout import LARGEST_IMBALANCE, HeadLayout
from moh_megatron.config.layer_heads import LayerHeads, layer_heads
from moh_megatron.config.schema import Config


def head_report(config: Config) -> str:
    """How evenly tensor-parallel ranks share the heads, for each kind of layer; a warning where this run's do not."""
    moh, model, tensor = config.moh, config.model, config.parallel.tensor
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
    parts, worst = [], 1.0
    for heads, layers in itertools.groupby(enumerate(layer_heads(model, moh), start=1), key=lambda item: item[1]):
        numbers = [number for number, _ in layers]
        parts.append(f"heads, {moh.head_layout}, {_named(numbers, model.num_layers)}: {_described(heads)}")
        parts.append(textwrap.indent(layout.report(heads.shared, heads.active, tensor), "  "))
        worst = max(worst, layout.imbalance(heads.shared, heads.active, tensor))
    if worst > LARGEST_IMBALANCE:
        parts.append(
            f"warning: at parallel.tensor {tensor} the busiest rank computes {worst:.2f} times the mean of its heads; "
            f"{layout.remedy}"
        )
    return "\n".join(parts)


def _named(numbers: list[int], of: int) -> str:
    if len(numbers) == of:
        return "every layer"
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"


def _described(heads: LayerHeads) -> str:
    return f"{heads.active} of {heads.count} active, {len(heads.shared)} of them shared"
