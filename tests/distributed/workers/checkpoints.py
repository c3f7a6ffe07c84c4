"""Trains, saves and resumes for workers, with the same global batches at any parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moh_megatron.checkpoint.async_saver import AsyncSaver
from moh_megatron.checkpoint.layout import checkpoint_name, read_config, read_weights
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.checkpoint.optimizer_state import StoredState
from moh_megatron.checkpoint.save import Snapshot
from moh_megatron.config.schema import Config
from moh_megatron.model.build import moh_layers, token_losses
from moh_megatron.moh.balancing import update_biases
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.session import build_engine


class NoTokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")


def config_of(
    tensor: int, stage: int, precision: str = "fp32", parallel: dict[str, Any] | None = None, **sections: dict[str, Any]
) -> Config:
    """Return a configuration; ``parallel`` has further values of that section."""
    parallel = {"tensor": tensor, "zero_stage": stage} | (parallel or {})
    return tiny.tiny_config(parallel=parallel, train={"precision": precision, "micro_batch_size": 1}, **sections)


def start_engine(config: Config, source: Path | None = None, *, resume: bool = True) -> Engine:
    """Return a fresh engine, or one that resumes from ``source`` or starts from its weights; make new groups only if
    tensor parallelism changes."""
    initialized = parallel_state.model_parallel_is_initialized()
    if initialized and parallel_state.get_tensor_model_parallel_world_size() == config.parallel.tensor:
        torch.manual_seed(config.run.seed)
    else:
        parallel_state.destroy_model_parallel()
        groups.initialize(config.parallel.tensor, config.run.seed)
    return build_engine(config, dist.get_world_size(), source, resume=resume and source is not None)


def train(engine: Engine, config: Config, first: int, last: int) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of the steps [first, last), the loss in fp64 over the full batch."""
    replicas, rank = groups.dp_group().size(), groups.dp_group().rank()
    layers = moh_layers(engine.module)
    curve = []
    for step in range(first, last):
        total = torch.zeros((), dtype=torch.float64)
        for rows in tiny.tokens(4, seed=100 + step).split(1)[rank::replicas]:
            loss = token_losses(engine.model, rows).mean()
            engine.backward(loss)
            total += loss.detach().double() / 4
        norm = float(engine.step(learning_rate(config.optimizer, step, config.train.steps)))
        if layers:
            counts = torch.stack([layer.statistics.drain(total.device) for layer in layers])[:, :-1]
            update_biases(layers, counts, groups.dp_group())
        dist.all_reduce(total, group=groups.dp_group())
        curve.append((float(total), norm))
    return curve


def save(engine: Engine, config: Config, root: Path, step: int) -> Path:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    saver = AsyncSaver(root, group)
    saver.begin(Snapshot.take(config, step, "d" * 64, NoTokenizer(), engine))
    saver.finish()
    dist.destroy_process_group(group)
    return root / checkpoint_name(step)


def differing(folder: Path, other: Path) -> list[str]:
    """Return the names of tensors that differ between two checkpoints, whatever parallelism wrote them."""
    one, another = _full_tensors(folder), _full_tensors(other)
    names = sorted(one.keys() | another.keys())
    return [name for name in names if not torch.equal(one.get(name, _NONE), another.get(name, _NONE))]


_NONE = torch.empty(0)


def _full_tensors(folder: Path) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    slots = ("exp_avg", "exp_avg_sq", "master")[: 2 if config.train.precision == "fp32" else 3]
    tensors = read_weights(folder)
    with StoredState(folder, config, 0, 1) as stored:
        tensors["updates"] = torch.tensor(stored.updates)
        for parameter in (rule.megatron for rule in rules(config) if rule.dtype is None):
            tensors |= {f"{slot}/{parameter}": stored.read(slot, parameter) for slot in slots}
    return tensors
