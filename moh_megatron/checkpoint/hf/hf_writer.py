"""The weights of a Hugging Face folder, written a piece at a time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from moh_megatron.checkpoint.hf.finite import check_finite, check_not_lost
from moh_megatron.checkpoint.hf.safetensors_stream import SafetensorsWriter
from moh_megatron.checkpoint.hf.streaming import one_thread, runs
from moh_megatron.checkpoint.hf.weight_readers import WeightSource, row_bytes
from moh_megatron.checkpoint.mapping import Rule, rules
from moh_megatron.config.schema import Config

INDEX = "model.safetensors.index.json"


def write_weights(
    folder: Path, config: Config, source: WeightSource, dtype: torch.dtype | None, max_shard_size: str
) -> None:
    """model.safetensors, or shards and their index, in ``folder``.

    Args:
        dtype: of all floating-point tensors; None leaves each its own.
        max_shard_size: of a file, as "5GB".

    Raises:
        UserError: a tensor is not finite, or not any more in ``dtype``, or a router vanishes in it; the message names
            the tensor.
    """
    table = rules(config)

    def kept(rule: Rule) -> torch.dtype:
        own = source.dtype(rule)
        return dtype if dtype is not None and own.is_floating_point else own

    described = {
        name: torch.empty(shape, dtype=kept(rule), device="meta")
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

        def put(rule: Rule, name: str, piece: Tensor) -> None:
            cast = piece.to(kept(rule))
            check_finite(cast, rule.megatron, before=piece)
            if ".router." in rule.megatron:
                check_not_lost(cast, rule.megatron, before=piece)
            files[plan.tensor_to_filename[name]].append(name, cast)

        for rule in table:
            if not rule.stacked:
                for name, part in zip(rule.hf, rule.split(source.whole(rule)), strict=True):
                    put(rule, name, part)
                continue
            for index, name in enumerate(rule.hf):
                for start, stop in runs(rule.rows, row_bytes(rule, source.dtype(rule))):
                    for piece in source.rows(rule, index * rule.rows + start, index * rule.rows + stop):
                        put(rule, name, piece)
    if plan.is_sharded:
        index_of = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index_of, indent=2) + "\n", encoding="utf-8")
