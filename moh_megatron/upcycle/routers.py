"""Initialises routers for a dense model so that every active head has gate 1, as in the dense model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.model.tensors import DTYPES
from moh_megatron.upcycle.source import check_gates

_DEVIATION = 1e-11
"""Logits of this size rank the heads, differently for each token, yet a softmax in fp32 rounds them to equal gates."""


def initial_routers(config: Config) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the tensors that a MoH model has and its dense model lacks, under Hugging Face's names.

    They are learned routers whose active gates are all 1, drawn from ``run.seed``, in the precision of training, and
    balancing biases of 0. A dense model has none of them, a query_norm router biases alone.

    Raises:
        UserError: moh.gating is not normalized, the only gating whose gates can all be 1.
    """
    check_gates(config)
    dtype = DTYPES[config.train.precision]
    generator = torch.Generator().manual_seed(config.run.seed)
    for rule in rules(config):
        if ".self_attention.router." not in rule.megatron:
            continue
        if rule.dtype is not None:
            yield rule.hf[0], torch.zeros(rule.shape, dtype=rule.dtype)
        else:
            yield rule.hf[0], (torch.randn(rule.shape, generator=generator) * _DEVIATION).to(dtype)
