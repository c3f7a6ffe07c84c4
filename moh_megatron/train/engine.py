"""Wraps DeepSpeed in a few methods: backward, step, norms, and the state for checkpoints. No other module imports it.

DeepSpeed does ZeRO, gradient accumulation, averaging over data parallelism and clipping, and nothing else.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.io.console import chatter_hidden, is_verbose
from moh_megatron.model.tensors import model_tensors
from moh_megatron.parallel import groups
from moh_megatron.train.deepspeed_config import check_known, deepspeed_config
from moh_megatron.train.fault_tolerance import run_store
from moh_megatron.train.fault_tolerance.world import World

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

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

    Raises UserError where there is no GPU for this rank.
    """
    _configure_logger()
    if torch.cuda.is_available():
        world.require_gpu(torch.cuda.device_count())
        torch.cuda.set_device(world.local_rank)
    else:
        # Otherwise DeepSpeed compiles an extension for minutes, under a lock that a killed run leaves behind.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            groups.backend(),
            store=run_store.torch_store(world, timeout),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            # As DeepSpeed does it: a bound device lets NCCL split later groups from the first one.
            device_id=groups.device(world.local_rank) if torch.cuda.is_available() and world.size > 1 else None,
        )
    deepspeed.init_distributed(dist_backend=groups.backend(), auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _configure_logger() -> None:
    """Send DeepSpeed's records to standard error: warnings, and under --verbose all from INFO on."""
    level = logging.INFO if is_verbose() else logging.WARNING
    deepspeed.logger.setLevel(level)
    for handler in deepspeed.logger.handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's own, and no subclass that somebody else has added.
            handler.setLevel(level)
            handler.stream = sys.stderr


def check_deepspeed_section(config: Config, world_size: int) -> None:
    """Raise UserError where the ``deepspeed`` section contradicts another one or has a key unknown to DeepSpeed."""
    replicas = data_parallel_size(config, world_size)
    steps = gradient_accumulation_steps(config, world_size)
    settings = deepspeed_config(config, replicas, steps, cuda=torch.cuda.is_available())
    # DeepSpeed checks the batch against the world size, which is 1 before the process group exists.
    one_rank = settings | {"train_batch_size": settings["train_batch_size"] // replicas}
    check_known(config.deepspeed, one_rank, DeepSpeedConfig)


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW without weight decay for norms, that is, for parameters with fewer than two dimensions."""
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
    """Trains one model on this rank.

    Args:
        model: the complete shard of this tensor-parallel rank; stage 3 partitions it over the data-parallel ranks in
            place.
        make_optimizer: makes the optimizer from model and configuration.
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
        """Whether the last step changed the weights: a gradient that is not finite changes nothing on any rank."""
        with chatter_hidden():
            self._deepspeed, _, _, _ = deepspeed.initialize(
                model=model,
                optimizer=self._optimizer,
                mpu=groups.DeepSpeedMpu(),
                config=deepspeed_config(config, data_parallel, accumulation_steps, cuda=torch.cuda.is_available()),
            )
        if self._stage == 0:
            # In the other stages DeepSpeed's optimizers skip a gradient that is not finite.
            self._optimizer.register_step_pre_hook(self._drop_gradients_unless_finite)
        self._make_state()
        if self._stage == 0 and data_parallel == 1:
            # This skips averaging over a single replica, which copies every gradient into a buffer and back.
            self._deepspeed.enable_backward_allreduce = False

    @property
    def model(self) -> nn.Module:
        """The model as DeepSpeed's engine, to be called in training."""
        return self._deepspeed

    @property
    def module(self) -> nn.Module:
        """The Megatron-core model inside; under stage 3 its parameters are complete only while it runs."""
        return self._module

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter and buffer of this tensor-parallel rank; all ranks iterate together.

        Stage 3 gathers each tensor when it is reached, and releases it at the next one.
        """
        for name, tensor in model_tensors(self._module).items():
            with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                yield name, tensor.detach()

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        state = (value for slots in self._optimizer.state.values() for value in slots.values())
        return sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's mean loss; the last one of a step also averages over replicas.

        A loss that is not finite makes all its gradients not finite, so that every rank skips the step.
        """
        self._deepspeed.backward(loss * (loss.detach() * 0 + 1))
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update the weights and clear the gradients; returns the global gradient norm before clipping."""
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
        # Without gradients the optimizer changes neither weights nor moments nor its count of steps.
        if not self.applied:
            optimizer.zero_grad(set_to_none=True)

    def _clear_offloaded_gradients(self) -> None:
        # With offload, stages 1 and 2 add gradients to buffers that a skipped step does not clear.
        zero: Any = self._deepspeed.optimizer
        if self._stage in (1, 2):
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = None
            for partition in zero.single_partition_of_fp32_groups:
                if partition.grad is not None:
                    partition.grad.zero_()

    def _own_gradient_norm(self) -> Tensor:
        # DeepSpeed reports no norm in stage 0. Replicated parameters count once, sharded ones on every rank.
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
        """The gradient norm of the routers, None where none is trained.

        All ranks call it between the last ``backward`` of a step and ``step``. Stages 1 to 3 gather each
        router's gradient, which is complete on every tensor-parallel rank.
        """
        routers = [parameter for name, parameter in self._trained() if ".router." in name]
        if not routers:
            return None
        gradients = [p.grad if self._stage == 0 else safe_get_full_grad(p) for p in routers]
        return torch.nn.utils.get_total_norm([gradient.float() for gradient in gradients if gradient is not None])

    def parameter_norm(self) -> Tensor:
        """The norm of all weights, in which replicated ones count once; all ranks call it."""
        group, replicas = groups.tp_group(), groups.dp_group()
        shards: list[Tensor] = []
        for parameter in cast(Iterator[Any], self._module.parameters()):
            if group.rank() != 0 and not getattr(parameter, "tensor_model_parallel", False):
                continue
            if self._stage < 3:
                shards.append(parameter.detach())
            else:
                # The shard of the last rank ends with padding of any content.
                shard = parameter.ds_tensor.detach().flatten()
                shards.append(shard[: max(0, min(shard.numel(), parameter.ds_numel - replicas.rank() * shard.numel()))])
        total = torch.nn.utils.get_total_norm([shard for shard in shards if shard.numel()]).float().square()
        dist.all_reduce(total, group=group)
        if self._stage == 3:
            dist.all_reduce(total, group=replicas)
        return total.sqrt()

    @property
    def updates(self) -> int:
        """How many times the optimizer has updated the weights."""
        return int(next(iter(self._optimizer.state.values()))["step"])

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(slot/parameter, fp32 tensor in the parameter's shape) of Adam's state; all ranks iterate together.

        The slots are Adam's two moments, and ``master`` where the weights exist in fp32 beside those in bf16.
        """
        for name, parameter in self._trained():
            for slot in _MOMENTS:
                if self._stage == 0:
                    yield f"{slot}/{name}", self._optimizer.state[parameter][slot]
                else:
                    yield f"{slot}/{name}", _in_shape(safe_get_full_optimizer_state(parameter, slot), parameter)
            if parameter.dtype is not torch.float32:
                yield f"{_MASTER}/{name}", _in_shape(safe_get_full_fp32_param(parameter), parameter)

    def load_optimizer(self, updates: int, read: Callable[[str, str], Tensor]) -> None:
        """Load Adam's state; ``read(slot, parameter)`` returns a tensor of ``optimizer_tensors``, of any stage.

        The weights themselves are loaded before the engine is made.
        """
        for state in self._optimizer.state.values():
            state["step"] = torch.full_like(state["step"], updates)
        for name, parameter in self._trained():
            if self._stage in (1, 2) and parameter._hp_mapping is None:
                continue  # No shard of it is on this rank.
            for slot in (*_MOMENTS, _MASTER) if parameter.dtype is not torch.float32 else _MOMENTS:
                self._set(parameter, slot, read(slot, name))

    def _trained(self) -> Iterator[tuple[str, Any]]:
        # Any: DeepSpeed adds attributes to parameters. Frozen parameters have no optimizer state.
        return ((name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad)

    def _set(self, parameter: Any, slot: str, full_tensor: Tensor) -> None:
        if self._stage == 0:
            self._optimizer.state[parameter][slot].copy_(full_tensor)
        elif self._stage < 3:
            flat = full_tensor.to(parameter.device).flatten()
            if slot == _MASTER:
                safe_set_full_fp32_param(parameter, flat)
            else:
                safe_set_full_optimizer_state(parameter, flat, slot)
        else:
            # DeepSpeed's function for full tensors ignores the padding of those that cannot be split evenly.
            size, rank = parameter.ds_tensor.numel(), groups.dp_group().rank()
            padded = nn.functional.pad(
                full_tensor.flatten(), (0, size * groups.dp_group().size() - full_tensor.numel())
            )
            shard = padded[rank * size : (rank + 1) * size].to(parameter.device)
            if slot == _MASTER:
                safe_set_local_fp32_param(parameter, shard)
            else:
                safe_set_local_optimizer_state(parameter, shard, slot)

    def _make_state(self) -> None:
        # Adam makes its state in its first update, group by group. After the first group DeepSpeed would link every
        # parameter to the state that exists, those of the second group to none. So it is made here, as Adam would do.
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return
        zero: Any = self._deepspeed.optimizer
        partitions = [p for group in self._optimizer.param_groups for p in group["params"]]
        for partition in zero.fp32_partitioned_groups_flat if self._stage == 3 else partitions:
            moments = {slot: torch.zeros_like(partition) for slot in _MOMENTS}
            self._optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
        if self._stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()


def _in_shape(state: Any, parameter: Any) -> Tensor:
    return state.view(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)
