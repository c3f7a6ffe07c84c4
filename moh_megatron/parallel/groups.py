"""The process groups of a run, and DeepSpeed's view of them.

Megatron-core's ``parallel_state`` holds the groups; DeepSpeed is given an ``mpu`` that answers from it. Ranks of one
tensor-parallel group are neighbours; data-parallel groups stride over them, as everywhere in Megatron.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moh_megatron.parallel import cpu_shim


def backend() -> str:
    """The communication library for the device that is there."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def device(local_rank: int) -> torch.device:
    """The device of a rank on its node."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


TIMEOUT = timedelta(minutes=30)
"""What torch gives a gloo group."""


def initialize(tensor_parallel: int, seed: int, timeout: timedelta = TIMEOUT) -> None:
    """Make the groups and seed the random states. torch.distributed must be initialised.

    A collective of these groups that waits longer than ``timeout`` is an error.

    The CPU generator, from which all weights are drawn, starts from ``seed`` on every rank: the same seed gives the
    same model at every tensor-parallel size.
    """
    cpu_shim.install()
    minutes: float = timeout.total_seconds() / 60  # annotated as whole minutes there
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        distributed_timeout_minutes=minutes,  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def tp_group() -> dist.ProcessGroup:
    """The ranks that share one replica of the model."""
    return _a_group(parallel_state.get_tensor_model_parallel_group())


def dp_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and see different data."""
    return _a_group(parallel_state.get_data_parallel_group())


def control_group(timeout: timedelta = TIMEOUT) -> dist.ProcessGroup:
    """A new group of all ranks for small things on the host: NCCL would need a transfer to the device and back."""
    return _a_group(dist.new_group(backend="gloo", timeout=timeout))


def _a_group(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup)
    return group


def destroy() -> None:
    """Forget the groups and leave torch.distributed."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class DeepSpeedMpu:
    """The names DeepSpeed asks a *model parallel unit* for, answered by Megatron-core's groups.

    It must not offer ``initialize_sequence_parallel``: DeepSpeed would take that for its own Ulysses parallelism.
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
