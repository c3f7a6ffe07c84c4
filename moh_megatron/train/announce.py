"""Describes a run in the log before its first step."""

from __future__ import annotations

import itertools
import logging
import textwrap

from moh_megatron.config.head_layout import LARGEST_IMBALANCE, HeadLayout
from moh_megatron.config.layer_heads import LayerHeads, layer_heads
from moh_megatron.config.parameter_count import parameter_count
from moh_megatron.config.schema import Config
from moh_megatron.model.attention_backend import attention_backend, attention_warning
from moh_megatron.train.session import Session

logger = logging.getLogger(__name__)


def announce(session: Session) -> None:
    """Log the size of the model, the parallel layout, the attention backend, the sources of data and the heads."""
    config, device, start = session.config, session.device, session.start_step
    tensor = config.parallel.tensor
    beginning = f"resumed after step {start}" if start else "from the start"
    logger.info(
        f"{config.run.dir}: {parameter_count(config.model, config.moh).total:,} parameters, "
        f"TP {tensor} x DP {session.world.size // tensor}, "
        f"ZeRO {config.parallel.zero_stage}, {config.train.precision}, {device.type}, "
        f"attention {attention_backend(config, device)}; "
        f"{config.train.steps:,} steps of {config.train.tokens_per_step:,} tokens, {beginning}"
    )
    if warning := attention_warning(config, device):
        logger.warning(warning)
    if config.data.sources:
        logger.info(session.data.budget(config))
    if config.moh.enabled:
        _announce_heads(config, warns=device.type != "cpu")


def _announce_heads(config: Config, *, warns: bool) -> None:
    """Log how evenly the tensor-parallel ranks of this run share the heads, for each kind of layer.

    Where ``warns``, an uneven share, which makes expensive devices wait, is also worth a warning.
    """
    moh, model, tensor = config.moh, config.model, config.parallel.tensor
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
    paragraphs, largest = [], 1.0
    for heads, layers in itertools.groupby(enumerate(layer_heads(model, moh), start=1), key=lambda item: item[1]):
        numbers = [number for number, _ in layers]
        paragraphs.append(f"heads, {moh.head_layout}, {_layer_range(numbers, model.num_layers)}: {_counts(heads)}")
        paragraphs.append(textwrap.indent(layout.report(heads.shared, heads.active, tensor), "  "))
        if heads.groups > 1:
            paragraphs.append(f"  {layout.evenness}")
        largest = max(largest, layout.imbalance(heads.shared, heads.active, tensor))
    logger.info("\n".join(paragraphs))
    if warns and largest > LARGEST_IMBALANCE:
        logger.warning(
            f"at parallel.tensor {tensor} the busiest rank computes {largest:.2f} times the mean of its heads, and the "
            "others wait for it; the lines above say what would even it out."
        )


def _layer_range(numbers: list[int], num_layers: int) -> str:
    if len(numbers) == num_layers:
        return "every layer"
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {numbers[0]} to {numbers[-1]}"


def _counts(heads: LayerHeads) -> str:
    return f"{heads.active} of {heads.count} active, {len(heads.shared)} of them shared"
