"""A whole model in this one process, from weights at hand: for export, verification and text generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, moh_layers, position_ids
from moh_megatron.model.tensors import model_tensors
from moh_megatron.moh.router import Router
from moh_megatron.parallel import groups

_PRECISION_OF = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def be_alone(seed: int) -> None:
    """Make the process groups of this one process, if there are none yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(tensor_parallel=1, seed=seed)


def build_single_process(
    config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The model of ``config`` without any parallelism, holding ``weights`` (full tensors, Megatron-core's names)."""
    be_alone(config.run.seed)
    alone = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, tensor=1, sequence=False),
        # What is loaded is the finished model, on its way down to fewer heads or not.
        # A backend that training named may not run on this device.
        moh=dataclasses.replace(config.moh, activation_schedule_steps=0, backend="auto"),
        train=dataclasses.replace(config.train, precision=_PRECISION_OF[dtype], recompute="none"),
    )
    model = build_model(alone)
    own = model_tensors(model)
    if missing := sorted(set(own) ^ set(weights)):
        raise ValueError(f"weights must hold exactly the model's tensors. They differ in {missing}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    return model.eval()


@torch.inference_mode()
def routing_margin(model: torch.nn.Module, tokens: Tensor) -> float:
    """How far the routing of ``tokens`` [B, S] is from a tie; infinite in a dense model.

    It is the smallest distance, over layers and tokens, of the last chosen routed head's score to the next one's.
    """
    margins = [float("inf")]

    def record(router: torch.nn.Module, inputs: tuple[Tensor, Tensor], output: object) -> None:
        assert isinstance(router, Router)
        scores, chosen = router.ranked_by(*inputs), router.top_k
        if scores is not None and chosen < scores.shape[-1]:
            ordered = scores.sort(-1, descending=True).values
            margins.append(float((ordered[..., chosen - 1] - ordered[..., chosen]).min()))

    hooks = [layer.router.register_forward_hook(record) for layer in moh_layers(model)]
    model(tokens, position_ids(tokens), None)
    for hook in hooks:
        hook.remove()
    return min(margins)


@torch.inference_mode()
def logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """tokens [B, S] -> logits [B, S, V] in fp32."""
    return model(tokens, position_ids(tokens), None).float()
