"""DeepSpeed behind five verbs: backward, step, save, load, and the gradient norm. Its only importer.

DeepSpeed owns ZeRO, gradient accumulation, averaging over data parallelism and clipping; nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.parallel import groups
from moh_megatron.train.deepspeed_config import check_known, deepspeed_config
from moh_megatron.train.world import World

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.config import DeepSpeedConfig


def initialize_distributed(world: World) -> None:
    """Join the process group of this run: NCCL on GPUs, gloo elsewhere."""
    deepspeed.logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    else:
        # Otherwise DeepSpeed compiles a shared-memory extension for minutes, under a lock a killed run leaves behind.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    deepspeed.init_distributed(
        dist_backend=groups.backend(),
        auto_mpi_discovery=False,
        verbose=False,
        rank=world.rank,
        world_size=world.size,
    )


def check_deepspeed_section(config: Config, world_size: int) -> None:
    """Raise UserError where the ``deepspeed`` section contradicts another, or holds what DeepSpeed does not know."""
    replicas = data_parallel_size(config, world_size)
    steps = gradient_accumulation_steps(config, world_size)
    settings = deepspeed_config(config, replicas, steps, cuda=torch.cuda.is_available())
    # DeepSpeed holds the batch against the world size, which is 1 before the processes meet.
    alone = settings | {"train_batch_size": settings["train_batch_size"] // replicas}
    check_known(config.deepspeed, alone, DeepSpeedConfig)


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW whose weight decay spares norms (every parameter with fewer than two dimensions)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    optimizer = config.optimizer
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optimizer.learning_rate,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_epsilon,
    )


class Engine:
    """One model in training on this rank.

    Args:
        model: this tensor-parallel rank's part, whole; stage 3 shares it out over the data-parallel ranks in place.
        make_optimizer: what updates the weights, from model and configuration.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        data_parallel: int,
        accumulation_steps: int,
        make_optimizer: Callable[[nn.Module, Config], torch.optim.Optimizer] = adamw,
    ) -> None:
        self._stage = config.parallel.zero_stage
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        """Of this tensor-parallel rank's part, whole."""
        self._optimizer = make_optimizer(model, config)
        self._settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self._optimizer.param_groups
        ]
        self._module = model
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            mpu=groups.DeepSpeedMpu(),
            config=deepspeed_config(config, data_parallel, accumulation_steps, cuda=torch.cuda.is_available()),
        )

    @property
    def model(self) -> nn.Module:
        """The model, callable as DeepSpeed wants it called."""
        return self._deepspeed

    @property
    def module(self) -> nn.Module:
        """The Megatron-core model inside; under stage 3 its parameters are whole only while it runs."""
        return self._module

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter and buffer, whole on this tensor-parallel rank; all ranks go through it.

        Stage 3 gathers each when its turn comes, and lets go of it at the next one.
        """
        for name, tensor in self._module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    yield name, tensor.detach()

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state this rank holds."""
        state = (value for slots in self._optimizer.state.values() for value in slots.values())
        return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss; the last one of a step also averages over DP."""
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, clear the gradients; returns the global gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._own_gradient_norm() if self._stage == 0 else None
        self._deepspeed.step()
        if norm is None:
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
        return norm.detach().float()

    def _own_gradient_norm(self) -> Tensor:
        # Stage 0 reports none. Replicated parameters count once, sharded ones on every tensor-parallel rank.
        group = groups.tensor_group()
        squares = [
            p.grad.float().square().sum()
            for p in self.module.parameters()
            if p.grad is not None and (group.rank() == 0 or getattr(p, "tensor_model_parallel", False))
        ]
        total = torch.stack(squares).sum()
        dist.all_reduce(total, group=group)
        return total.sqrt()

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's part of a checkpoint (optimizer state, its copy of the weights); all ranks call it."""
        with contextlib.redirect_stdout(None):
            self._deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote at the same topology; all ranks call it."""
        path, _ = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no state in {folder}.")
        # DeepSpeed restores these too; the configuration of this life of the run is what counts.
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
