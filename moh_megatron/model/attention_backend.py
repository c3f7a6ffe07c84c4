"""Reports which backend computes attention for a configuration, and refuses or warns of one that cannot or is slow."""

from __future__ import annotations

import warnings

import torch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import even_in_kv_groups, heads_after
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.model.tensors import DTYPES
from moh_megatron.moh.backends.choice import choose_backend
from moh_megatron.moh.sparse import refusal


def attention_backends(
    config: Config, device: torch.device, step: int | None = None, *, length: int | None = None
) -> list[list[str]]:
    """The backend of each layer on each tensor-parallel rank, for documents of ``length``; None: as long as a sequence.

    ``auto`` is resolved for the shares of active heads expected after ``step`` steps of the activation schedule; None
    means when the schedule has ended.
    """
    model, moh, tensor = config.model, config.moh, config.parallel.tensor
    if moh.fixed_backend is not None:
        return [[moh.fixed_backend] * tensor] * model.num_layers
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
    length, dtype = length or config.train.sequence_length, DTYPES[config.train.precision]
    even = even_in_kv_groups(model, moh)
    return [
        [
            choose_backend(
                length=length,
                share=load * tensor / heads.count,
                dtype=dtype,
                device=device,
                even=even,
            )
            for load in layout.expected_load(heads.shared, heads.active, tensor)
        ]
        for heads in heads_after(model, moh, step)
    ]


def attention_backend(config: Config, device: torch.device) -> str:
    """The backend that computes attention in training, when the activation schedule has ended, in words.

    Layers and tensor-parallel ranks with different shares of active heads may use different backends; all are named.
    """
    if config.moh.fixed_backend is not None:
        return config.moh.fixed_backend
    named = _names(attention_backends(config, device))
    short = _names(attention_backends(config, device, length=1)) if config.data.document_mask else named
    return named if short == named else f"{named}, {short} where documents are short"


def _names(backends: list[list[str]]) -> str:
    distinct = sorted({backend for layer in backends for backend in layer})
    return " or ".join(distinct) + (", by the heads of a layer and rank" if len(distinct) > 1 else "")


def check_backend(config: Config, device: torch.device) -> None:
    """Raise UserError where ``moh.backend`` cannot compute in this precision on this device."""
    moh = config.moh
    if moh.enabled and (reason := refusal(moh.backend, DTYPES[config.train.precision], device)):
        raise UserError(f"moh.backend: {reason} Got {config.train.precision} on {device.type}; use auto or gathered.")


def attention_warning(config: Config, device: torch.device) -> str | None:
    """Why attention will be slow on this GPU; None where it is fast, or computed by other kernels than PyTorch's own.

    The number of slots makes no difference to those.
    """
    used = {backend for layer in attention_backends(config, device) for backend in layer}
    if device.type != "cuda" or used.isdisjoint({"dense", "slots"}):
        return None
    model, tensor = config.model, config.parallel.tensor
    reason = flash_refusal(
        length=config.train.sequence_length,
        heads=model.num_attention_heads // tensor,
        groups=model.query_groups // tensor,
        head_dim=model.head_dim,
        dtype=DTYPES[config.train.precision],
        device=device,
    )
    return reason and f"attention runs without the flash kernel, slower and with more memory: {reason}"


def flash_refusal(
    *, length: int, heads: int, groups: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why causal attention of ``heads`` query heads over ``groups`` KV groups cannot use torch's flash kernel.

    None if it can. The other kernels are several times slower on a GPU.
    """
    q = torch.empty(1, heads, length, head_dim, dtype=dtype, device=device)
    k = v = torch.empty(1, groups, length, head_dim, dtype=dtype, device=device)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, True, heads != groups), debug=True):
            return None
    return " ".join(str(reason.message) for reason in reasons) or "this build of torch has no flash attention"
