"""What real engines hold and send on this rank, by bare torch accounting: for the planner to be compared with."""

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

# An odd number of layers: the border between two data-parallel partitions lies inside a weight.
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
"""Cases at TP 2 whose forward and backward pass is listened to."""


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
    """Every tensor inside nested lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)


def held(running: Engine) -> dict[str, int]:
    """Bytes of the storages behind each kind of tensor; one that serves two kinds counts once."""
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
            [each.grad for each in tensors_in(masters)],
            of_optimizer("averaged_gradients", "all_grad_tensors", "grads_in_partition", "accumulated_grads_in_cpu"),
            of_optimizer("grad_partitions_flat_buffer", "fp32_groups_gradients_flat"),
        ],
        "optimizer": [masters, list(state.values())],
    }
    seen: set[int] = set()
    sizes = {}
    for kind, values in kinds.items():
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors_in(values)}
        sizes[kind] = sum(size for address, size in storages.items() if address not in seen)
        seen |= storages.keys()
    return sizes


class Listener(TorchDispatchMode):
    """Bytes of the whole tensor of each collective, by operation; loss figures and means, which are small, left out."""

    SMALL = 256
    WHOLE: ClassVar = {
        "allreduce_": ("all-reduce", 0),
        "_allgather_base_": ("all-gather", 0),
        "_reduce_scatter_base_": ("reduce-scatter", 1),
    }
    """Which argument of torch's own operator is the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, list[int]] = {"all-reduce": [], "all-gather": [], "reduce-scatter": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname in self.WHOLE:
            operation, place = self.WHOLE[func._opname]
            size = sum(each.nbytes for each in tensors_in(args[place]))
            if size >= self.SMALL:
                self.sizes[operation].append(size)
        return func(*args, **(kwargs or {}))


def most_held(config: Config) -> tuple[dict[str, int], dict[str, list[int]]]:
    """The most of each kind at the end of any backward pass of the second step, and what that step sends."""
    world = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, world), data_parallel_size(config, world)
    model = tiny.fresh_model(config, accumulation)
    running = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    moments, listener = [], Listener()
    for _ in range(2):
        moments.clear()
        listener = Listener()
        with listener:
            for rows in tiny.tokens(config.train.global_batch_size).split(1)[::replicas]:
                running.backward(token_losses(running.model, rows).mean())
                moments.append(held(running))
            running.step(1e-4)
    return {kind: max(moment[kind] for moment in moments) for kind in moments[0]}, listener.sizes


def heard(config: Config) -> dict[str, list[int]]:
    """What one micro-batch makes the tensor-parallel ranks exchange."""
    model, listener = tiny.fresh_model(config), Listener()
    with listener:
        token_losses(model, tiny.tokens(1)).mean().backward()
    return listener.sizes


if __name__ == "__main__":
    engine.joined()
    results: dict[Any, Any] = {}
    for tensor in (1, 2):
        if dist.get_world_size() // tensor in (1, 2):
            for case, sections in CASES.items():
                config = case_config(sections, tensor)
                results[case, tensor] = config, *most_held(config)
            model = tiny.fresh_model(config)
            results["weights", tensor] = config, [(name, p.numel()) for name, p in model.named_parameters()]
    for case, sections in TRAFFIC.items() if dist.get_world_size() == 2 else ():
        config = case_config(sections, 2)
        results["traffic", case] = config, heard(config)
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
