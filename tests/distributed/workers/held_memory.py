"""Measures with torch what real engines hold and send on this rank, to compare the planner with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import engine
import tiny
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import token_losses
from moh_megatron.train.engine import Engine

# With an odd number of layers, the border between two data-parallel partitions lies inside a weight.
SHAPE = {"num_layers": 3}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    f"{precision}_zero{stage}": {"train": {"precision": precision}, "parallel": {"zero_stage": stage}}
    for precision in ("fp32", "bf16")
    for stage in (0, 1, 2, 3)
    if (precision, stage) != ("bf16", 0)
}
CASES |= {
    "persistent": {
        "parallel": {"zero_stage": 3},
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 5000}},
    },
    "frozen": {"parallel": {"zero_stage": 2}, "moh": {"freeze_router": True}},
    "tied": {"parallel": {"zero_stage": 1}, "model": {"tie_word_embeddings": True}},
}
CASES |= {
    f"offload_{precision}_zero{stage}": {
        "train": {"precision": precision},
        "parallel": {"zero_stage": stage, "offload_optimizer": True},
    }
    for precision in ("fp32", "bf16")
    for stage in (1, 2, 3)
}
CASES |= {
    f"{name}_one_micro_batch": {**CASES[name], "train": {**CASES[name]["train"], "global_batch_size": 2}}
    for name in ("fp32_zero1", "fp32_zero2", "bf16_zero1", "bf16_zero2", "offload_fp32_zero1", "offload_bf16_zero1")
}
CASES["offload_bf16_zero1_small_buckets"] = {
    **CASES["offload_bf16_zero1"],
    "deepspeed": {"zero_optimization": {"reduce_bucket_size": 20_000}},
}
TRAFFIC: dict[str, dict[str, dict[str, Any]]] = {
    "tp": {"parallel": {}},
    "sp": {"parallel": {"sequence": True}},
    "query_norm": {"parallel": {}, "moh": {"router": "query_norm"}},
    "sp_query_norm": {"parallel": {"sequence": True}, "moh": {"router": "query_norm"}},
    "recompute": {"parallel": {}, "train": {"recompute": "full"}},
    "sp_recompute": {"parallel": {"sequence": True}, "train": {"recompute": "full"}},
    "dense": {"parallel": {}, "moh": {"enabled": False}},
}
"""Cases at TP 2 whose communication in the forward and backward pass is recorded."""


def case_config(sections: dict[str, dict[str, Any]], tensor: int) -> Config:
    """The configuration of a case, two micro-batches or more to a step unless it says otherwise."""
    return tiny.tiny_config(
        model={**SHAPE, **sections.get("model", {})},
        moh=sections.get("moh", {}),
        train={"micro_batch_size": 1, **sections.get("train", {})},
        parallel={"tensor": tensor, **sections.get("parallel", {})},
        deepspeed=sections.get("deepspeed", {}),
    )


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """Yield every tensor inside nested lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)


def held(running: Engine) -> dict[str, int]:
    """Return the bytes of the storages of each kind of tensor; a storage of two kinds counts once."""
    parameters, optimizer = list(running.module.parameters()), running.model.optimizer
    state = running._optimizer.state  # pyright: ignore[reportPrivateUsage]

    def of_optimizer(*names: str) -> list[Any]:
        return [getattr(optimizer, name, None) for name in names]

    masters = of_optimizer(
        "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"
    )
    kinds = {
        "parameters": [[p.data, getattr(p, "ds_tensor", None)] for p in parameters],
        "gradients": [
            [[p.grad, getattr(p, "grad_accum", None)] for p in parameters],
            [master.grad for master in tensors_in(masters)],
            of_optimizer("averaged_gradients", "all_grad_tensors", "grads_in_partition", "accumulated_grads_in_cpu"),
            of_optimizer("grad_partitions_flat_buffer", "fp32_groups_gradients_flat"),
        ],
        "optimizer": [masters, list(state.values())],
    }
    seen: set[int] = set()
    sizes = {}
    for kind, values in kinds.items():
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors_in(values)
        }
        sizes[kind] = sum(size for address, size in storages.items() if address not in seen)
        seen |= storages.keys()
    return sizes


class CollectiveRecorder(TorchDispatchMode):
    """Records the bytes of the full tensor of each collective by operation, without small ones such as losses."""

    SMALL = 256
    FULL_TENSOR: ClassVar = {
        "allreduce_": ("all-reduce", 0),
        "_allgather_base_": ("all-gather", 0),
        "_reduce_scatter_base_": ("reduce-scatter", 1),
    }
    """Which argument of torch's operator is the full tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {"all-reduce": [], "all-gather": [], "reduce-scatter": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in self.FULL_TENSOR:
            operation, index = self.FULL_TENSOR[func._opname]
            size = sum(tensor.nbytes for tensor in tensors_in(args[index]))
            if size >= self.SMALL:
                self.sizes[operation].append(size)
        return func(*args, **(kwargs or {}))


def peak_held(config: Config) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Return the peak of each kind after the backward passes of the second step, and what that step sends."""
    world = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, world), data_parallel_size(config, world)
    model = tiny.fresh_model(config, accumulation)
    running = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    moments, recorder = [], CollectiveRecorder()
    for _ in range(2):
        moments.clear()
        recorder = CollectiveRecorder()
        with recorder:
            for rows in tiny.tokens(config.train.global_batch_size).split(1)[::replicas]:
                running.backward(token_losses(running.model, rows).mean())
                moments.append(held(running))
            running.step(1e-4)
    return {kind: max(moment[kind] for moment in moments) for kind in moments[0]}, recorder.sizes


def sent(config: Config) -> dict[str, list[int]]:
    """Return the bytes that tensor-parallel ranks exchange for one micro-batch."""
    model, recorder = tiny.fresh_model(config), CollectiveRecorder()
    with recorder:
        token_losses(model, tiny.tokens(1)).mean().backward()
    return recorder.sizes


if __name__ == "__main__":
    engine.join()
    results: dict[Any, Any] = {}
    for tensor in (1, 2):
        if dist.get_world_size() // tensor in (1, 2):
            for case, sections in CASES.items():
                config = case_config(sections, tensor)
                results[case, tensor] = config, *peak_held(config)
            model = tiny.fresh_model(config)
            results["weights", tensor] = config, [(name, p.numel()) for name, p in model.named_parameters()]
    for case, sections in TRAFFIC.items() if dist.get_world_size() == 2 else ():
        config = case_config(sections, 2)
        results["traffic", case] = config, sent(config)
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
