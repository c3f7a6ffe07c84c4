"""Everything a training run needs on this rank, made in the order it must be made in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from moh_megatron.checkpoint.hf.hf_extras import HFExtras, read_extras
from moh_megatron.checkpoint.layout import tokenizer_folder
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset import Sequences, build_train_dataset, build_validation_datasets
from moh_megatron.data.prepared import PreparedData
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.model.build import check_backend
from moh_megatron.parallel import groups
from moh_megatron.train.build_engine import build_engine
from moh_megatron.train.engine import Engine, initialize_distributed
from moh_megatron.train.fault_tolerance import agreement
from moh_megatron.train.fault_tolerance.watchdog import GRACE_SECONDS, Watchdog
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.preflight import preflight
from moh_megatron.train.resume import check_same_run, check_same_tokenizer, newest_good, weights_to_start_from
from moh_megatron.train.startup import StartupClock
from moh_megatron.train.teacher import find_teacher, keep_teacher, load_teacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """One run on one rank, ready for its next step."""

    config: Config
    world: World
    device: torch.device
    engine: Engine
    tokenizer: Tokenizer
    hf_extras: HFExtras
    """What checkpoints keep with it."""
    data: PreparedData
    train_dataset: Sequences
    validation_datasets: dict[str, Sequences]
    """Of each source."""
    start_step: int
    """Steps already done; 0 for a new run."""
    teacher: nn.Module | None
    """Of distillation."""

    @property
    def first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.world.rank == 0

    @property
    def eos_token_id(self) -> int | None:
        """The token at which attention stops, or None where it crosses documents."""
        return self.tokenizer.eos_token_id if self.config.data.document_mask else None


def _agreed(world: World, look: Callable[[], Path | None]) -> Path | None:
    """What the first rank sees (it reads every byte); a mistake it finds is raised on every rank."""
    found: list[Path | Exception | None] = [None]
    if world.rank == 0:
        try:
            found[0] = look()
        except Exception as error:  # raised below, on every rank alike
            found[0] = error
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def prepare_session(config: Config, world: World, watchdog: Watchdog, clock: StartupClock) -> Session:
    """Process groups, data, model, engine, and the state to go on from.

    Raises UserError on every rank where the ranks do not agree on what they are about to train.
    """
    data = preflight(config, world.size)
    # The group of all ranks serves what may be slow; a step's collectives have the watchdog's time, and a little more
    # so that it speaks first.
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

    checkpoint = _agreed(world, lambda: newest_good(config))
    start_step = 0
    if checkpoint is not None:
        start_step = check_same_run(checkpoint, config, world.size, data.hash).step
    elsewhere = _agreed(world, lambda: weights_to_start_from(config)) if checkpoint is None else None

    tokenizer = data.tokenizer()
    source = checkpoint or elsewhere
    teacher = _agreed(world, lambda: find_teacher(config))
    _agreed(world, lambda: keep_teacher(config, teacher, begun=checkpoint is not None))
    for model in (source, teacher):
        if model is not None:
            check_same_tokenizer(model, tokenizer)
    train_dataset = build_train_dataset(config, data, tokenizer)
    validation_datasets = build_validation_datasets(config, data, tokenizer)
    clock.mark("data")

    engine = build_engine(config, world.size, source, resume=checkpoint is not None)
    agreement.require_agreement(agreement.weights(engine.module, engine.weights(), groups.tp_group().rank()))
    clock.mark("model and engine")
    return Session(
        config,
        world,
        device,
        engine,
        tokenizer,
        HFExtras(tokenizer, {} if source is None else read_extras(tokenizer_folder(source))),
        data,
        train_dataset,
        validation_datasets,
        start_step,
        None if teacher is None else load_teacher(teacher, config, device),
    )
