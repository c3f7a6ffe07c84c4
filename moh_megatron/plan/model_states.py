"""Counts the bytes of parameters, gradients and optimizer state that DeepSpeed's ZeRO holds on one rank.

The numbers are exact, and a test compares them with real engines; only the buffers are an upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.plan.parameters import Weight, total_size, weights
from moh_megatron.plan.stage3 import most_gathered, persistent_size
from moh_megatron.train.deepspeed_config import deepspeed_config

ELEMENT = {"fp32": 4, "bf16": 2}
"""Bytes of one parameter or activation."""
_FP32 = 4
_ALIGNMENT = 2
"""DeepSpeed pads a flat group of weights to a multiple of this times the data-parallel size."""
_FALLBACK_BUCKET = 500_000_000
"""Elements in DeepSpeed's all-reduce bucket for gradients that ZeRO does not partition."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on the busiest rank: on its device and, with ZeRO-Offload, in host memory."""

    parameters: int
    gradients: int
    """The largest size at the end of a backward pass of a step."""
    optimizer: int
    """Adam's two moments and, from stage 1 on, the fp32 master weights."""
    buffers: int
    """An upper bound of communication buffers and, with stage 3, of the parameters gathered at one time."""
    host_gradients: int = 0
    host_optimizer: int = 0
    teacher: int = 0
    """The frozen teacher of distillation, assumed to be the dense twin."""

    @property
    def device(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers + self.teacher


def zero_settings(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` on GPUs, with the user's additions."""
    replicas, steps = data_parallel_size(config, world_size), gradient_accumulation_steps(config, world_size)
    return deepspeed_config(config, replicas, steps, cuda=True)["zero_optimization"]


def model_states(config: Config, world_size: int) -> ModelStates:
    """The bytes of one rank. Raises UserError if ``world_size`` or the section ``deepspeed`` does not fit."""
    account = _Account(config, world_size)
    states = account.replicated() if config.parallel.zero_stage == 0 else account.partitioned()
    if config.distillation.teacher is None:
        return states
    dense = replace(config, moh=replace(config.moh, enabled=False))
    return replace(states, teacher=ELEMENT[config.train.precision] * total_size(weights(dense)))


class _Account:
    def __init__(self, config: Config, world_size: int) -> None:
        self.replicas = data_parallel_size(config, world_size)
        self.steps = gradient_accumulation_steps(config, world_size)
        self.settings = zero_settings(config, world_size)
        self.stage, self.offload = config.parallel.zero_stage, config.parallel.offload_optimizer
        self.element = ELEMENT[config.train.precision]
        self.weights = weights(config)
        self.trained = [weight for weight in self.weights if weight.trained]
        self.bf16 = config.train.precision == "bf16"

    def replicated(self) -> ModelStates:
        """The states under stage 0, which is always fp32."""
        trained = total_size(self.trained)
        return ModelStates(
            parameters=_FP32 * total_size(self.weights),
            gradients=_FP32 * trained,
            optimizer=2 * _FP32 * trained,
            buffers=self._fallback_buffer(),
        )

    def partitioned(self) -> ModelStates:
        """The states under stages 1 to 3."""
        share = self._share()
        state = 3 * _FP32 * share
        gradients, host_gradients = self._gradients(share)
        return ModelStates(
            parameters=self.element * self._parameters(),
            gradients=gradients,
            optimizer=0 if self.offload else state,
            buffers=self._buffers(),
            host_gradients=host_gradients,
            host_optimizer=state if self.offload else 0,
        )

    def _groups(self) -> list[list[Weight]]:
        """The optimizer's parameter groups."""
        return [[weight for weight in self.trained if weight.matrix is matrix] for matrix in (True, False)]

    def _padded(self) -> list[int]:
        unit = _ALIGNMENT * self.replicas
        return [-(-total_size(group) // unit) * unit for group in self._groups()]

    def _share(self) -> int:
        """The number of trained elements whose optimizer state this rank holds."""
        if self.stage == 3:
            return sum(-(-weight.size // self.replicas) for weight in self.trained)
        return sum(self._padded()) // self.replicas

    def _parameters(self) -> int:
        if self.stage < 3:
            return total_size(self.weights) - total_size(self.trained) + sum(self._padded())
        partition = sum(-(-weight.size // self.replicas) for weight in self.weights)
        return partition + (persistent_size(self.weights, self.settings) if self.replicas > 1 else 0)

    def _gradients(self, share: int) -> tuple[int, int]:
        """Bytes on the device and on the host."""
        complete, partition = _FP32 * total_size(self.trained), _FP32 * share
        bucket = _FP32 * int(self.settings["reduce_bucket_size"])
        match self.stage, self.bf16, self.offload:
            case 1, True, False:  # DeepSpeed's BF16_Optimizer: the bf16 gradients, and their fp32 sum
                return self.element * total_size(self.trained) + _FP32 * sum(self._padded()), 0
            case 1, _, False if self.steps > 1:
                return complete, 0
            case ((1 | 2), False, False):  # both ranks keep all of a weight that crosses a partition border
                return _FP32 * max(self._touched()), 0
            case _, _, False:
                return partition, 0
            case 1, True, True:  # summed in full, then kept in the bucket of their reduction
                if self.replicas == 1:
                    return complete, partition
                return max(complete if self.steps > 1 else 0, bucket + partition), partition
            case 1, False, True:
                return complete if self.steps > 1 else 0, partition
            case 2, True, True:
                return partition, partition
            case 2, False, True:
                return 0, partition + (_FP32 * max(self._touched()) if self.steps > 1 else 0)
            case _:
                return 0, 2 * partition

    def _touched(self) -> list[int]:
        """For each data-parallel rank, the elements of all weights that overlap its partition."""
        totals = [0] * self.replicas
        for group, padded in zip(self._groups(), self._padded(), strict=True):
            width, start = padded // self.replicas, 0
            for weight in group:
                for rank in range(start // width, (start + weight.size - 1) // width + 1):
                    totals[rank] += weight.size
                start += weight.size
        return totals

    def _fallback_buffer(self) -> int:
        return _FP32 * min(total_size(self.trained), _FALLBACK_BUCKET) if self.replicas > 1 else 0

    def _buffers(self) -> int:
        if self.stage == 1 and self.bf16 and not self.offload:
            return self._fallback_buffer()
        bucket = _FP32 * int(self.settings["reduce_bucket_size"])
        if self.stage < 3:
            return bucket * (2 if self.settings["overlap_comm"] else 1)
        gathered = min(total_size(self.weights), most_gathered(self.settings))
        return bucket + (self.element * gathered if self.replicas > 1 else 0)
