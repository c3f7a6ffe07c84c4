"""Builds a model without parallelism in a single process, for export, verification and text generation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, moh_layers, position_ids
from moh_megatron.model.tensors import DTYPES, model_tensors
from moh_megatron.moh.router import Router
from moh_megatron.moh.routing import in_groups
from moh_megatron.parallel import groups

_PRECISION_OF = {dtype: name for name, dtype in DTYPES.items()}


def init_single_process(seed: int) -> None:
    """Create the process groups of a world of one, if there are none yet."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(tensor_parallel=1, seed=seed)


def build_single_process(
    config: Config, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The model of ``config`` without parallelism, with ``weights``: full tensors by Megatron-core's names.

    Raises:
        ValueError: ``weights`` has other tensors than the model.
    """
    init_single_process(config.run.seed)
    single = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, tensor=1, sequence=False),
        # The model uses its final number of heads, even if its activation schedule has not ended.
        # The backend of training may not run on this device.
        moh=dataclasses.replace(config.moh, activation_schedule_steps=0, backend="auto"),
        train=dataclasses.replace(config.train, precision=_PRECISION_OF[dtype], recompute="none"),
    )
    model = build_model(single)
    tensors = model_tensors(model)
    if missing := sorted(set(tensors) ^ set(weights)):
        raise ValueError(f"weights must hold exactly the model's tensors. They differ in {missing}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
    return model.eval()


@torch.inference_mode()
def routing_margin(model: torch.nn.Module, tokens: Tensor) -> float:
    """The smallest distance, over layers and tokens [B, S], from the last chosen routed head's score to the next one's.

    A routing near a tie has a small margin; a dense model's is infinite.
    """
    margins = [float("inf")]

    def record(router: torch.nn.Module, inputs: tuple[Tensor, Tensor], output: object) -> None:
        assert isinstance(router, Router)
        scores, groups = router.selection_scores(*inputs), router.heads.groups
        if scores is not None and router.top_k < scores.shape[-1]:
            ordered, chosen = in_groups(scores, groups).sort(-1, descending=True).values, router.top_k // groups
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
