"""Model and engine, fresh or in the state of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.checkpoint import layout, random_states, weights
from moh_megatron.checkpoint.optimizer_state import StoredState
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import build_model
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine


def build_engine(config: Config, world_size: int, source: Path | None = None, *, resume: bool = False) -> Engine:
    """The engine of this rank; the process groups must exist.

    Args:
        source: a checkpoint to take the weights from.
        resume: take its optimizer state too, and, where the topology is the same, its random states. At another one
            they stay as the seed made them: nothing in a training step draws from them.

    Raises:
        UserError: the weights are of another architecture.
    """
    accumulation_steps = gradient_accumulation_steps(config, world_size)
    model = build_model(config, accumulation_steps)
    tensor_rank = groups.tp_group().rank()
    written_by = config if source is None else layout.read_config(source)
    if source is not None:
        weights.load_into(model, config, source, written_by, tensor_rank)
    engine = Engine(
        model,
        config,
        data_parallel=data_parallel_size(config, world_size),
        accumulation_steps=accumulation_steps,
    )
    if source is not None and resume:
        with StoredState(source, written_by, tensor_rank, config.parallel.tensor) as stored:
            engine.load_optimizer(stored.updates, stored.read)
        if layout.read_state(source).topology == layout.topology_of(config, world_size):
            random_states.restore(source)
    return engine
