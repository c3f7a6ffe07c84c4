"""What is refused before any rank is started. Imports nothing heavy, so that a mistake shows at once."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.data.prepared import PreparedData, load_prepared
from moh_megatron.evaluate.suite import load_suite


def preflight(config: Config, world_size: int) -> PreparedData:
    """The prepared data, if this configuration can train on it with so many ranks; UserError otherwise."""
    data_parallel_size(config, world_size)
    gradient_accumulation_steps(config, world_size)
    if config.deepspeed:
        # DeepSpeed itself knows its keys; importing it takes seconds, so only where there is something to look up.
        from moh_megatron.train.engine import check_deepspeed_section

        check_deepspeed_section(config, world_size)
    if config.evaluate.suite is not None:
        load_suite(Path(config.evaluate.suite))
    data = load_prepared(config)
    data.check_fits(config)
    data.tokenizer()
    return data
