"""DeepSpeed behind a few verbs: backward, step, the gradient norm, and what a checkpoint needs. Its only importer.

DeepSpeed owns ZeRO, gradient accumulation, averaging over data parallelism and clipping; nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.io.console import is_verbose
from moh_megatron.model.tensors import model_tensors
from moh_megatron.parallel import groups
from moh_megatron.train.deepspeed_config import check_known, deepspeed_config
from moh_megatron.train.fault_tolerance.world import World

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "info" if is_verbose() else "warning")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

_MOMENTS = ("exp_avg", "exp_avg_sq")
_MASTER = "master"


def initialize_distributed(world: World, timeout: timedelta = groups.TIMEOUT) -> None:
    """Join the process group of this run: NCCL on GPUs, gloo elsewhere. Its collectives wait for ``timeout``.

    Raises UserError where this rank finds no GPU of its own.
    """
    if not is_verbose():
        deepspeed.logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        world.require_gpu(torch.cuda.device_count())
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
        self._stage, self._offloads = config.parallel.zero_stage, config.parallel.offload_optimizer
        self._optimizer = make_optimizer(model, config)
        self._module = model
        self.applied = True
        """Whether the last step changed the weights: where the gradient was not finite, nothing changes on any rank."""
        self._deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            mpu=groups.DeepSpeedMpu(),
            config=deepspeed_config(config, data_parallel, accumulation_steps, cuda=torch.cuda.is_available()),
        )
        if self._stage == 0:
            # DeepSpeed's ZeRO optimizers skip a gradient that is not finite by themselves.
            self._optimizer.register_step_pre_hook(self._drop_gradients_unless_finite)
        self._make_state()
        if self._stage == 0 and data_parallel == 1:
            # The average over one replica: every gradient copied into one buffer and back.
            self._deepspeed.enable_backward_allreduce = False

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
        for name, tensor in model_tensors(self._module).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                yield name, tensor.detach()

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
        if self._stage == 0:
            norm = self._own_gradient_norm()
            self.applied = bool(torch.isfinite(norm))
            self._deepspeed.step()
        else:
            self._deepspeed.step()
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm())
            self.applied = self._deepspeed.was_step_applied()
            if self._offloads and not self.applied:
                self._clear_offloaded_gradients()
        return norm.detach().float()

    def _drop_gradients_unless_finite(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        # What has no gradient is left alone: the weights, Adam's moments and its count of steps.
        if not self.applied:
            optimizer.zero_grad(set_to_none=True)

    def _clear_offloaded_gradients(self) -> None:
        # With offload, stages 1 and 2 add a step's gradients to buffers that a skipped step does not clear.
        zero: Any = self._deepspeed.optimizer
        if self._stage in (1, 2):
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
            for partition in zero.single_partition_of_fp32_groups:
                if partition.grad is not None:
                    partition.grad.zero_()

    def _own_gradient_norm(self) -> Tensor:
        # Stage 0 reports none. Replicated parameters count once, sharded ones on every tensor-parallel rank.
        group = groups.tp_group()
        gradients = [
            p.grad
            for p in self.module.parameters()
            if p.grad is not None and (group.rank() == 0 or getattr(p, "tensor_model_parallel", False))
        ]
        total = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(total, group=group)
        return total.sqrt()

    def router_gradient_norm(self) -> Tensor | None:
        """Of the routers alone, between the last ``backward`` of a step and ``step``; None where none is trained.

        All ranks call it: stages 1 to 3 gather each router's gradient, which every tensor-parallel rank holds whole.
        """
        routers = [parameter for name, parameter in self._trained() if ".router." in name]
        if not routers:
            return None
        gradients = [p.grad if self._stage == 0 else safe_get_full_grad(p) for p in routers]
        return torch.nn.utils.get_total_norm([each.float() for each in gradients if each is not None])

    def parameter_norm(self) -> Tensor:
        """Of all weights, replicated ones counted once; all ranks call it."""
        group, replicas = groups.tp_group(), groups.dp_group()
        held: list[Tensor] = []
        for parameter in cast(Iterator[Any], self._module.parameters()):
            if group.rank() != 0 and not getattr(parameter, "tensor_model_parallel", False):
                continue
            if self._stage < 3:
                held.append(parameter.detach())
            else:
                # The last rank's part is padded with whatever lay there.
                part = parameter.ds_tensor.detach().flatten()
                held.append(part[: max(0, min(part.numel(), parameter.ds_numel - replicas.rank() * part.numel()))])
        total = torch.nn.utils.get_total_norm([each for each in held if each.numel()]).float().square()
        dist.all_reduce(total, group=group)
        if self._stage == 3:
            dist.all_reduce(total, group=replicas)
        return total.sqrt()

    @property
    def updates(self) -> int:
        """How many times the optimizer has updated the weights."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(slot/parameter, fp32 tensor in the parameter's shape) of Adam's state; all ranks go through it together.

        The slots are Adam's two moments, and ``master`` where the weights are kept in fp32 beside those in bf16.
        """
        for name, parameter in self._trained():
            for slot in _MOMENTS:
                if self._stage == 0:
                    yield f"{slot}/{name}", self._optimizer.state[parameter][slot]
                else:
                    yield f"{slot}/{name}", _whole(safe_get_full_optimizer_state(parameter, slot), parameter)
            if parameter.dtype is not torch.float32:
                yield f"{_MASTER}/{name}", _whole(safe_get_full_fp32_param(parameter), parameter)

    def load_optimizer(self, updates: int, read: Callable[[str, str], Tensor]) -> None:
        """Take over Adam's state; ``read(slot, parameter)`` gives what ``optimizer_tensors`` gave, at any stage.

        The weights themselves are set before the engine is made.
        """
        for state in self._optimizer.state.values():
            state["step"] = torch.full_like(state["step"], updates)
        for name, parameter in self._trained():
            if self._stage in (1, 2) and parameter._hp_mapping is None:
                continue  # no part of it is here
            for slot in (*_MOMENTS, _MASTER) if parameter.dtype is not torch.float32 else _MOMENTS:
                self._set(parameter, slot, read(slot, name))

    def _trained(self) -> Iterator[tuple[str, Any]]:
        # Any: DeepSpeed hangs its own attributes on parameters. Frozen ones have no state.
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def _set(self, parameter: Any, slot: str, whole: Tensor) -> None:
        if self._stage == 0:
            self._optimizer.state[parameter][slot].copy_(whole)
        elif self._stage < 3:
            flat = whole.to(parameter.device).flatten()
            if slot == _MASTER:
                safe_set_full_fp32_param(parameter, flat)
            else:
                safe_set_full_optimizer_state(parameter, flat, slot)
        else:
            # DeepSpeed's function for whole tensors does not know the padding of uneven ones.
            size, rank = parameter.ds_tensor.numel(), groups.dp_group().rank()
            padded = nn.functional.pad(whole.flatten(), (0, size * groups.dp_group().size() - whole.numel()))
            part = padded[rank * size : (rank + 1) * size].to(parameter.device)
            if slot == _MASTER:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, slot)

    def _make_state(self) -> None:
        # Adam makes its state in its first update, group by group, and after the first group DeepSpeed ties every
        # parameter to the state there is: those of the second group to none. So it is made here, as Adam would.
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return
        zero: Any = self._deepspeed.optimizer
        partitions = [p for group in self._optimizer.param_groups for p in group["params"]]
        for partition in zero.fp32_partitioned_groups_flat if self._stage == 3 else partitions:
            moments = {slot: torch.zeros_like(partition) for slot in _MOMENTS}
            self._optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()


def _whole(state: Any, parameter: Any) -> Tensor:
    return state.view(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)
