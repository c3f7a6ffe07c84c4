"""Makes everything a training run needs on this rank, in the order in which it must be made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moh_megatron.checkpoint import layout, weights
from moh_megatron.checkpoint.hf.hf_extras import HFExtras, read_extras
from moh_megatron.checkpoint.optimizer_state import StoredState
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.data.dataset import Sequences, build_train_dataset, build_validation_datasets
from moh_megatron.data.prepared_data import PreparedData
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.model.attention_backend import check_backend
from moh_megatron.model.build import build_model
from moh_megatron.parallel import groups, rng
from moh_megatron.train.engine import Engine, initialize_distributed
from moh_megatron.train.fault_tolerance import agreement
from moh_megatron.train.fault_tolerance.watchdog import GRACE_SECONDS, Watchdog
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.preflight import preflight
from moh_megatron.train.resume import check_same_run, check_same_tokenizer, newest_good, weights_to_start_from
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.teacher import find_teacher, load_teacher, record_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A training run on one rank, ready for its next step."""

    config: Config
    world: World
    device: torch.device
    engine: Engine
    tokenizer: Tokenizer
    hf_extras: HFExtras
    """Files of a Hugging Face folder, the tokenizer's among them, that each checkpoint carries along."""
    data: PreparedData
    train_dataset: Sequences
    validation_datasets: dict[str, Sequences]
    """The held-out text of each source."""
    start_step: int
    """Steps already done; 0 for a new run."""
    teacher: nn.Module | None
    """The frozen model of distillation."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and logs for all."""
        return self.world.rank == 0

    @property
    def eos_token_id(self) -> int | None:
        """The token at which attention stops; None where attention crosses documents."""
        return self.tokenizer.eos_token_id if self.config.data.document_mask else None


def _on_first_rank(world: World, find: Callable[[], Path | None]) -> Path | None:
    """What ``find`` returns on the first rank (it reads every byte); every rank raises the error that it raises."""
    found: list[Path | Exception | None] = [None]
    if world.rank == 0:
        try:
            found[0] = find()
        except Exception as error:  # Raised below, on every rank alike.
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def prepare_session(config: Config, world: World, watchdog: Watchdog, clock: StartupClock) -> Session:
    """Make the process groups, data, model and engine, and load the checkpoint to resume from.

    Raises UserError on every rank where the ranks do not agree on what they are about to train.
    """
    logger.info(f"{world.size} {'rank is' if world.size == 1 else 'ranks are'} up: reading the data")
    data = preflight(config, world.size)
    # The group of all ranks serves slow operations. The collectives of a step wait a little longer than the watchdog,
    # so that the watchdog reports first.
    initialize_distributed(world, timedelta(seconds=watchdog.slow + GRACE_SECONDS))
    agreement.require_agreement(
        {
            "the configuration": agreement.configuration(config),
            "the software": agreement.software(),
            "the data": agreement.dataset(data),
        }
    )
    agreement.require_shared(Path(config.run.dir))
    groups.initialize(config.parallel.tensor, config.run.seed, timedelta(seconds=watchdog.timeout + GRACE_SECONDS))
    device = groups.device(world.local_rank)
    check_backend(config, device)
    clock.mark("groups")

    checkpoint = _on_first_rank(world, lambda: newest_good(config))
    start_step = 0
    if checkpoint is not None:
        start_step = check_same_run(checkpoint, config, world.size, data.hash).step
    initial_weights = _on_first_rank(world, lambda: weights_to_start_from(config)) if checkpoint is None else None

    tokenizer = data.tokenizer()
    source = checkpoint or initial_weights
    teacher = _on_first_rank(world, lambda: find_teacher(config))
    _on_first_rank(world, lambda: record_teacher(config, teacher, resumed=checkpoint is not None))
    for model in (source, teacher):
        if model is not None:
            check_same_tokenizer(model, tokenizer)
    train_dataset = build_train_dataset(config, data, tokenizer)
    validation_datasets = build_validation_datasets(config, data, tokenizer)
    clock.mark("data")

    logger.info("building the model and its optimizer" if source is None else f"loading the weights of {source}")
    engine = build_engine(config, world.size, source, resume=checkpoint is not None)
    agreement.require_agreement(agreement.weights(engine.module, engine.weights(), groups.tp_group().rank()))
    clock.mark("model and engine")
    return Session(
        config=config,
        world=world,
        device=device,
        engine=engine,
        tokenizer=tokenizer,
        hf_extras=HFExtras(tokenizer, {} if source is None else read_extras(layout.tokenizer_folder(source))),
        data=data,
        train_dataset=train_dataset,
        validation_datasets=validation_datasets,
        start_step=start_step,
        teacher=None if teacher is None else load_teacher(teacher, config, device),
    )


def build_engine(config: Config, world_size: int, source: Path | None = None, *, resume: bool = False) -> Engine:
    """Build the engine of this rank; the process groups must exist.

    Args:
        source: a checkpoint to load the weights from.
        resume: load its optimizer state too, and, where the topology is the same, its random states. At another
            topology they stay as the seed made them: no training step draws from them.

    Raises:
        UserError: the weights have another architecture.
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
            rng.restore_file(layout.random_states_file(source, dist.get_rank()))
    return engine
