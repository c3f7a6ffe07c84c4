"""Creates the process groups of a run, and shows them to DeepSpeed.

Megatron-core's ``parallel_state`` holds the groups; DeepSpeed gets an ``mpu`` that reads them from there. As usual in
Megatron, the ranks of a tensor-parallel group are consecutive, and data-parallel groups stride over them.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moh_megatron.parallel import cpu_shim


def backend() -> str:
    """Return the communication library for the available device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def device(local_rank: int) -> torch.device:
    """Return the device of the rank ``local_rank`` of a node."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


TIMEOUT = timedelta(minutes=30)
"""The default timeout of a gloo group in torch."""


def initialize(tensor_parallel: int, seed: int, timeout: timedelta = TIMEOUT) -> None:
    """Create the groups and seed the random states. torch.distributed must be initialised.

    A collective of these groups fails after ``timeout``. The CPU generator, from which all weights are drawn, starts
    from ``seed`` on every rank: the same seed gives the same model at every tensor-parallel size.
    """
    cpu_shim.install()
    minutes: float = timeout.total_seconds() / 60  # Megatron-core annotates it as int.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        distributed_timeout_minutes=minutes,  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def tp_group() -> dist.ProcessGroup:
    """Return the tensor-parallel group: the ranks that share one replica of the model."""
    return _as_group(parallel_state.get_tensor_model_parallel_group())


def dp_group() -> dist.ProcessGroup:
    """Return the data-parallel group: the ranks that hold the same shard of the model and train on different data."""
    return _as_group(parallel_state.get_data_parallel_group())


def control_group(timeout: timedelta = TIMEOUT) -> dist.ProcessGroup:
    """Return a new gloo group of all ranks for small host tensors, which NCCL would have to move to the device."""
    return _as_group(dist.new_group(backend="gloo", timeout=timeout))


def _as_group(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)
    return group


def destroy() -> None:
    """Destroy the groups and torch.distributed's."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedMpu:
    """Megatron-core's groups under the names that DeepSpeed expects of a *model parallel unit*.

    It must not have ``initialize_sequence_parallel``, by which DeepSpeed recognises its own Ulysses parallelism.
    """

    get_model_parallel_group = get_tensor_model_parallel_group = staticmethod(
        parallel_state.get_tensor_model_parallel_group
    )
    get_model_parallel_world_size = get_tensor_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_model_parallel_rank = get_tensor_model_parallel_rank = staticmethod(
        parallel_state.get_tensor_model_parallel_rank
    )
    get_slice_parallel_world_size = get_model_parallel_world_size
    get_slice_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
