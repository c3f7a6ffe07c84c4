"""Model and engine, fresh or in the state of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from moh_megatron.checkpoint import native, random_states, weights
from moh_megatron.checkpoint.optimizer_state import StoredState
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import build_model
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine
from moh_megatron.train.startup import StartupClock


def build_engine(
    config: Config, world_size: int, clock: StartupClock, source: Path | None = None, *, resume: bool = False
) -> Engine:
    """The engine of this rank; the process groups must exist.

    Args:
        clock: told when the model is done.
        source: a checkpoint to take the weights from.
        resume: take its optimizer state too, and, where the topology is the same, its random states. At another one
            they stay as the seed made them: nothing in a training step draws from them.

    Raises:
        UserError: the weights are of another architecture.
    """
    accumulation_steps = gradient_accumulation_steps(config, world_size)
    model = build_model(config, accumulation_steps)
    tensor_rank = groups.tensor_group().rank()
    if source is not None:
        weights.load_into(model, config, source, native.read_config(source), tensor_rank)
    clock.mark("model")
    engine = Engine(
        model,
        config,
        data_parallel=data_parallel_size(config, world_size),
        accumulation_steps=accumulation_steps,
    )
    if source is not None and resume:
        with StoredState(source, native.read_config(source), tensor_rank, config.parallel.tensor) as stored:
            engine.load_optimizer(stored.updates, stored.read)
        if native.read_state(source).topology == native.topology_of(config, world_size):
            random_states.restore(source)
    return engine
