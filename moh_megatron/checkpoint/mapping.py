"""Maps Megatron-core's weights to Hugging Face LLaMA's and back: a table of names and pure tensor functions.

Legend: D hidden size, N query heads, G KV groups, H head size, F feed-forward size, V vocabulary.
Megatron-core fuses query, key and value into one matrix, ``[q .. q k v]`` rows for each KV group, and gate and up
projection into another. Its KV groups stand in physical order (see ``HeadLayout``), Hugging Face's in logical order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moh_megatron.config.head_layout import HeadLayout, inverse
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.parameter_count import router_biases, router_weight_rows
from moh_megatron.config.schema import Config, ModelConfig
from moh_megatron.io.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One row of the table: a Megatron-core tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    """Shape of the full Megatron-core tensor."""
    dim: int | None = None
    """The dimension that tensor parallelism shards; None: every rank holds the full tensor."""
    dtype: torch.dtype | None = None
    """Set where the tensor has the same dtype whatever the model's precision."""
    stride: int = 1
    """How many matrices are stacked along ``dim``, each of them sharded: 2 for the fused gate and up projection."""
    padding: int = 0
    """How many of the last rows no Hugging Face tensor has."""
    to_parts: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    """Megatron-core -> Hugging Face; None where the Hugging Face tensors, of equal shapes, are stacked along rows."""
    from_parts: Callable[[Sequence[Tensor]], Tensor] | None = None
    """The inverse of ``to_parts``."""

    @property
    def stacked(self) -> bool:
        """Whether the full tensor is the Hugging Face tensors stacked along rows, and the padding."""
        return self.to_parts is None

    @property
    def rows(self) -> int:
        """How many rows each Hugging Face tensor of a stacked tensor has."""
        return (self.shape[0] - self.padding) // len(self.hf)

    def split(self, full_tensor: Tensor) -> tuple[Tensor, ...]:
        """Megatron-core -> Hugging Face, one tensor for each name in ``hf``."""
        if self.to_parts is not None:
            return self.to_parts(full_tensor)
        return tuple(full_tensor[: self.shape[0] - self.padding].split(self.rows))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of ``split``; padding is 0."""
        if self.from_parts is not None:
            return self.from_parts(parts)
        padding = [parts[0].new_zeros(self.padding, *self.shape[1:])] if self.padding else []
        return torch.cat([*parts, *padding]) if len(parts) + len(padding) > 1 else parts[0]

    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each tensor in ``hf``."""
        return [tuple(part.shape) for part in self.split(torch.empty(self.shape, device="meta"))]


def split_qkv(fused: Tensor, model: ModelConfig, order: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """[G * (N/G + 2) * H, D], groups in ``order`` -> query [N * H, D], key and value [G * H, D], in logical order."""
    groups, width, size = model.query_groups, model.num_attention_heads // model.query_groups, model.head_dim
    logical = fused.view(groups, width + 2, size, -1)[inverse(order)]
    query, key, value = logical.split([width, 1, 1], dim=1)
    return query.flatten(0, 2), key.flatten(0, 2), value.flatten(0, 2)


def join_qkv(parts: Sequence[Tensor], model: ModelConfig, order: Sequence[int]) -> Tensor:
    """The inverse of ``split_qkv``."""
    groups, size = model.query_groups, model.head_dim
    logical = torch.cat([part.reshape(groups, -1, size, part.shape[-1]) for part in parts], dim=1)
    return logical[list(order)].flatten(0, 2)


def permute_columns(projection: Tensor, groups: int, order: Sequence[int]) -> Tensor:
    """[D, N * H]: the column block of each KV group moved, so that block i of the result is block ``order[i]``."""
    return projection.unflatten(1, (groups, -1))[:, list(order)].flatten(1)


def _layer_rules(config: Config, index: int) -> Iterator[Rule]:
    model = config.model
    heads, groups, size = model.num_attention_heads, model.query_groups, model.head_dim
    order = HeadLayout(heads, groups, config.moh.head_layout).group_order
    ours, hf = f"decoder.layers.{index}", f"model.layers.{index}"
    hidden, ffn = model.hidden_size, model.ffn_hidden_size

    yield Rule(f"{ours}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), (hidden,))
    yield Rule(
        f"{ours}.self_attention.linear_qkv.weight",
        tuple(f"{hf}.self_attn.{name}_proj.weight" for name in "qkv"),
        ((heads + 2 * groups) * size, hidden),
        dim=0,
        to_parts=lambda fused: split_qkv(fused, model, order),
        from_parts=lambda parts: join_qkv(parts, model, order),
    )
    yield Rule(
        f"{ours}.self_attention.linear_proj.weight",
        (f"{hf}.self_attn.o_proj.weight",),
        (hidden, heads * size),
        dim=1,
        to_parts=lambda physical: (permute_columns(physical, groups, inverse(order)),),
        from_parts=lambda parts: permute_columns(parts[0], groups, order),
    )
    own = layer_heads(model, config.moh)[index]
    for name, rows in router_weight_rows(config.moh, own).items():
        router = f"{hf}.self_attn.router.{name.removeprefix('w_')}.weight"
        yield Rule(f"{ours}.self_attention.router.{name}", (router,), (rows, hidden))
    if biases := router_biases(config.moh, own):
        steps = f"{hf}.self_attn.router.bias_steps"
        yield Rule(f"{ours}.self_attention.router.bias_steps", (steps,), (biases,), dtype=torch.int64)
    yield Rule(f"{ours}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), (hidden,))
    yield Rule(
        f"{ours}.mlp.linear_fc1.weight",
        (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
        (2 * ffn, hidden),
        dim=0,
        stride=2,
    )
    yield Rule(f"{ours}.mlp.linear_fc2.weight", (f"{hf}.mlp.down_proj.weight",), (hidden, ffn), dim=1)


def rules(config: Config) -> list[Rule]:
    """The table of one model, in the order of its layers."""
    model = config.model
    vocabulary: dict[str, Any] = {
        "shape": (model.vocab_size, model.hidden_size),
        "dim": 0,
        "padding": model.vocab_padding,
    }
    table = [Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), **vocabulary)]
    for index in range(model.num_layers):
        table.extend(_layer_rules(config, index))
    table.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), (model.hidden_size,)))
    if not model.tie_word_embeddings:
        table.append(Rule("output_layer.weight", ("lm_head.weight",), **vocabulary))
    return table


class HasShape(Protocol):
    """A tensor, or a description of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def check_names_and_shapes(state: Mapping[str, HasShape], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise UserError unless ``state`` has exactly the names of ``shapes``, each with its shape."""

    def names(title: str, found: list[str]) -> str:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return f"{title}: {', '.join(found[:5])}{more}."

    remedy = "The weights and the configuration must be of the same model."
    if missing := [name for name in shapes if name not in state]:
        raise UserError(f"{what}: {names('missing tensors', missing)} {remedy}")
    if unexpected := [name for name in state if name not in shapes]:
        raise UserError(f"{what}: {names('unexpected tensors', unexpected)} {remedy}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(f"{what}: {name} must have shape {list(shape)}. Got {list(state[name].shape)}. {remedy}")


def to_hf(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """A full Megatron-core state (all tensor-parallel shards merged) under Hugging Face's names and in its layout.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape than ``config`` gives it.
    """
    table = rules(config)
    check_names_and_shapes(state, {rule.megatron: rule.shape for rule in table}, "Megatron-core weights")
    return {name: part for rule in table for name, part in zip(rule.hf, rule.split(state[rule.megatron]), strict=True)}


def from_hf(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """The inverse of ``to_hf``, bit for bit.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape than ``config`` gives it.
    """
    table = rules(config)
    shapes = {name: shape for rule in table for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)}
    check_names_and_shapes(state, shapes, "Hugging Face weights")
    return {rule.megatron: rule.join([state[name] for name in rule.hf]) for rule in table}


def split_shard(full: Tensor, dim: int | None, stride: int, rank: int, world: int) -> Tensor:
    """The shard of ``full`` that tensor-parallel ``rank`` of ``world`` holds.

    Args:
        dim: the dimension that is sharded; None returns ``full``.
        stride: how many matrices are stacked along ``dim``; the rank holds its shard of each.

    Raises:
        ValueError: ``dim`` does not divide evenly.
    """
    if dim is None:
        return full
    if full.shape[dim] % (stride * world):
        raise ValueError(f"dimension {dim} must be a multiple of {stride} x {world}. Got {full.shape[dim]}.")
    return full.unflatten(dim, (stride, world, -1)).select(dim + 1, rank).flatten(dim, dim + 1)


def merge_shards(shards: Sequence[Tensor], dim: int | None, stride: int) -> Tensor:
    """The inverse of ``split_shard``: the full tensor from the shards of all tensor-parallel ranks, in rank order."""
    if dim is None or len(shards) == 1:
        return shards[0]
    parts = [shard.unflatten(dim, (stride, -1)) for shard in shards]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 2)


def shard_shape(rule: Rule, world: int) -> tuple[int, ...]:
    """Shape of what one of ``world`` tensor-parallel ranks holds of a tensor."""
    if rule.dim is None:
        return rule.shape
    shape = list(rule.shape)
    shape[rule.dim] //= world
    return tuple(shape)


def shard_rows(rule: Rule, start: int, rows: Tensor, world: int) -> Iterator[tuple[int, Tensor]]:
    """Split some rows of a full tensor over ``world`` tensor-parallel ranks.

    Args:
        start: index of the first of ``rows``.

    Yields:
        (rank, its part), in the order of each rank's own rows.
    """
    if rule.dim is None:
        yield from ((rank, rows) for rank in range(world))
    elif rule.dim == 1:
        yield from enumerate(rows.chunk(world, 1))
    else:
        height, row, stop = rule.shape[0] // (rule.stride * world), start, start + len(rows)
        while row < stop:
            end = min((row // height + 1) * height, stop)
            yield row // height % world, rows[row - start : end - start]
            row = end


def unshard_rows(
    rule: Rule, start: int, stop: int, world: int, read: Callable[[int, int, int], Tensor]
) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` of a full tensor, in chunks; ``read(rank, first, end)`` gives a rank's own rows."""
    if rule.dim is None:
        yield read(0, start, stop)
    elif rule.dim == 1:
        parts = [read(rank, start, stop) for rank in range(world)]
        yield torch.cat(parts, 1) if world > 1 else parts[0]
    else:
        height, row = rule.shape[0] // (rule.stride * world), start
        while row < stop:
            block, end = row // height, min((row // height + 1) * height, stop)
            first = block // world * height + row % height
            yield read(block % world, first, first + end - row)
            row = end
