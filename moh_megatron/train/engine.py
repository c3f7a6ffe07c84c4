"""DeepSpeed behind five verbs: backward, step, save, load, and the gradient norm. Its only importer.

DeepSpeed owns ZeRO, gradient accumulation, averaging over data parallelism and clipping; nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh_megatron.config.schema import Config
from moh_megatron.parallel import groups
from moh_megatron.train.world import World

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "warning")

import deepspeed
import deepspeed.ops

_BUCKET_ELEMENTS = 200_000_000


def initialize_distributed(world: World, timeout: timedelta = groups.TIMEOUT) -> None:
    """Join the process group of this run: NCCL on GPUs, gloo elsewhere. Its collectives wait for ``timeout``."""
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
        timeout=timeout,
        rank=world.rank,
        world_size=world.size,
    )


def deepspeed_config(config: Config, data_parallel: int, accumulation_steps: int, parameters: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours in this one place."""
    bucket = min(_BUCKET_ELEMENTS, parameters)
    settings: dict[str, Any] = {
        "train_batch_size": config.train.micro_batch_size * data_parallel * accumulation_steps,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": 2**62,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


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
    """One model in training on this rank."""

    def __init__(self, model: nn.Module, config: Config, *, data_parallel: int, accumulation_steps: int) -> None:
        self._stage = config.parallel.zero_stage
        count = sum(p.numel() for p in model.parameters())
        self._optimizer = adamw(model, config)
        self._settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self._optimizer.param_groups
        ]
        self._module = model
        self.applied = True
        """Whether the last step changed the weights: where the gradient was not finite, nothing changes on any rank."""
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            mpu=groups.DeepSpeedMpu(),
            config=deepspeed_config(config, data_parallel, accumulation_steps, count),
        )
        if self._stage == 0:
            # DeepSpeed's ZeRO optimizers skip a gradient that is not finite by themselves.
            self._optimizer.register_step_pre_hook(self._drop_gradients_unless_finite)

    @property
    def model(self) -> nn.Module:
        """The model, callable as DeepSpeed wants it called."""
        return self._deepspeed

    @property
    def module(self) -> nn.Module:
        """The Megatron-core model inside."""
        return self._module

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state this rank holds."""
        state = (value for slots in self._optimizer.state.values() for value in slots.values())
        return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss; the last one of a step also averages over DP.

        A loss that is not finite makes its gradients so, whatever it is made of: the step is then skipped everywhere.
        """
        self._deepspeed.backward(loss * (loss.detach() * 0 + 1))
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights, clear the gradients; returns the global gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._own_gradient_norm() if self._stage == 0 else None
        if norm is not None:
            self.applied = bool(torch.isfinite(norm))
        self._deepspeed.step()
        if norm is None:
            self.applied = self._deepspeed.was_step_applied()
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
        return norm.detach().float()

    def _drop_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        # What has no gradient is left alone: the weights, Adam's moments and its count of steps.
        if not self.applied:
            optimizer.zero_grad(set_to_none=True)

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
