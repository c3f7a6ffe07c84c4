"""When a conversion is verified without being asked to."""

from __future__ import annotations

from moh_megatron.config.count import parameter_count
from moh_megatron.config.schema import Config

LARGEST_UNASKED = 100_000_000
"""Parameters up to which a model is verified whether asked or not: it takes the memory of the model in fp32."""


def is_small(config: Config) -> bool:
    """Whether a model has at most ``LARGEST_UNASKED`` parameters."""
    return parameter_count(config.model, config.moh).total <= LARGEST_UNASKED
