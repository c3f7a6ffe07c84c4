"""Writes the weights of a Hugging Face folder chunk by chunk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from moh_megatron.checkpoint.hf.streaming import one_thread, row_ranges
from moh_megatron.checkpoint.hf.weight_readers import WeightSource, check_finite, check_not_lost, row_bytes
from moh_megatron.checkpoint.mapping import Rule, rules
from moh_megatron.config.schema import Config
from moh_megatron.io.safetensors_stream import SafetensorsWriter

INDEX = "model.safetensors.index.json"


def write_weights(
    folder: Path, config: Config, source: WeightSource, dtype: torch.dtype | None, max_shard_size: str
) -> None:
    """Write model.safetensors, or several files and their index, into ``folder``.

    Args:
        dtype: dtype of all floating-point tensors; None keeps each tensor's own.
        max_shard_size: largest size of a file, such as "5GB".

    Raises:
        UserError: a tensor is not finite, or not any more in ``dtype``, or all weights of a router become 0 in it; the
            message names the tensor.
    """
    table = rules(config)

    def written_dtype(rule: Rule) -> torch.dtype:
        own = source.dtype(rule)
        return dtype if dtype is not None and own.is_floating_point else own

    described = {
        name: torch.empty(shape, dtype=written_dtype(rule), device="meta")
        for rule in table
        for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)
    }
    plan = split_torch_state_dict_into_shards(described, max_shard_size=max_shard_size)
    with one_thread(), ExitStack() as stack:
        files = {
            file: stack.enter_context(
                SafetensorsWriter(
                    folder / file, {name: (described[name].dtype, tuple(described[name].shape)) for name in names}
                )
            )
            for file, names in plan.filename_to_tensors.items()
        }

        def append(rule: Rule, name: str, chunk: Tensor) -> None:
            cast = chunk.to(written_dtype(rule))
            check_finite(cast, rule.megatron, before=chunk)
            if ".router." in rule.megatron:
                check_not_lost(cast, rule.megatron, before=chunk)
            files[plan.tensor_to_filename[name]].append(name, cast)

        for rule in table:
            if not rule.stacked:
                for name, tensor in zip(rule.hf, rule.split(source.full_tensor(rule)), strict=True):
                    append(rule, name, tensor)
                continue
            for index, name in enumerate(rule.hf):
                first = index * rule.rows
                for start, stop in row_ranges(rule.rows, row_bytes(rule, source.dtype(rule))):
                    for chunk in source.chunks(rule, first + start, first + stop):
                        append(rule, name, chunk)
    if plan.is_sharded:
        content = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
