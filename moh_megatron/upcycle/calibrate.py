"""Measures how much each head matters to a dense model: the rise of its loss with the head removed."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import routing_groups
from moh_megatron.config.schema import Config
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, write_json
from moh_megatron.model.build import model_arguments


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of a calibration and the conditions it was measured under."""

    tokens: int
    """How many tokens it was measured on."""
    loss: float
    """The loss of the model with all heads, in nats a token."""
    removal: tuple[tuple[float, ...], ...]
    """By layer and logical head, the rise of the loss without that head."""
    conditions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Weights, data and settings that determine the result; ``of`` in the file."""

    @property
    def ranking(self) -> tuple[tuple[int, ...], ...]:
        """The heads of each layer in falling order of the rise without them; of equals, the lower number first."""
        return tuple(
            tuple(sorted(range(len(rises)), key=lambda head, rises=rises: (-rises[head], head)))
            for rises in self.removal
        )

    def shared(self, count: int, groups: int = 1) -> tuple[tuple[int, ...], ...]:
        """The first ``count`` heads of each layer's ranking, in rising order of their numbers.

        With ``groups`` they are the first ``count`` / ``groups`` of each of so many groups of consecutive heads.
        """
        return tuple(_first_of_groups(heads, count // groups, groups) for heads in self.ranking)


def _first_of_groups(ranking: Sequence[int], count: int, groups: int) -> tuple[int, ...]:
    """The first ``count`` heads of each group in ``ranking``, in rising order."""
    width = len(ranking) // groups
    members = ([head for head in ranking if head // width == group] for group in range(groups))
    return tuple(sorted(itertools.chain.from_iterable(heads[:count] for heads in members)))


@torch.inference_mode()
def calibrate(model: nn.Module, config: Config, tokens: Tensor, eos_token_id: int | None = None) -> Calibration:
    """Measure ``model``, a dense model in this single process, on tokens [B, S + 1].

    A head is removed by setting its output to zero. The layers before it are not computed again. ``eos_token_id`` is
    the token between documents where attention stays inside each document, as in training.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    arguments = model_arguments(inputs, eos_token_id)
    decoder: Any = model.decoder
    layers = list(decoder.layers)
    order = HeadLayout(config.model.num_attention_heads, config.model.query_groups, config.moh.head_layout).head_order
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(_recorder(hidden), with_kwargs=True) for layer in layers]
    loss = float(model(*arguments, labels=labels).double().mean())
    for hook in hooks:
        hook.remove()
    removal = []
    bar = progress_bar("calibrate", len(layers) * len(order), "head")
    try:
        for index, layer in enumerate(layers):
            decoder.layers = nn.ModuleList(layers[index:])
            rises = {}
            for position, head in enumerate(order):
                with _without_head(layer, position, config.model.head_dim):
                    losses = model(*arguments, decoder_input=hidden[index], labels=labels)
                rises[head] = float(losses.double().mean()) - loss
                bar.update()
            removal.append(tuple(rises[head] for head in sorted(rises)))
    finally:
        decoder.layers = nn.ModuleList(layers)
        bar.close()
    return Calibration(labels.numel(), loss, tuple(removal))


def _recorder(hidden: list[Tensor]) -> Any:
    def record(layer: nn.Module, positional: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        hidden.append(positional[0] if positional else named["hidden_states"])

    return record


@contextmanager
def _without_head(layer: Any, position: int, size: int) -> Iterator[None]:
    """Set the output of the head at the physical ``position`` in ``layer`` to zero while the block runs."""

    def zero_head(projection: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        heads = inputs[0].clone()
        heads[..., position * size : (position + 1) * size] = 0
        return (heads,)

    hook = layer.self_attention.linear_proj.register_forward_pre_hook(zero_head)
    try:
        yield
    finally:
        hook.remove()


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the calibration and the ranking that follows from it as JSON, atomically."""
    content = dataclasses.asdict(calibration)
    content["of"] = content.pop("conditions")
    write_json(path, {**content, "ranking": calibration.ranking})


def read_calibration(path: Path) -> Calibration:
    """Read a file of ``write_calibration``. Raises UserError where it is something else."""
    remedy = "Delete it to measure again."
    content = read_json(path, "a calibration", remedy)
    try:
        removal = tuple(tuple(map(_finite, layer)) for layer in content["removal"])
        tokens = int(content["tokens"])
        return Calibration(tokens, _finite(content["loss"]), removal, dict(content.get("of", {})))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a calibration. Got another content ({error}). {remedy}") from None


def _finite(number: Any) -> float:
    if isinstance(number, str) or not math.isfinite(number):
        raise ValueError(f"{number!r} is no finite number")
    return float(number)


def with_calibrated_heads(config: Config, calibration: Calibration) -> Config:
    """``config`` with moh.shared_placement: calibrated replaced by the heads that the calibration ranks first.

    With moh.routing_groups: kv they are those ranked first in each KV group, equally many of each.

    Raises:
        UserError: the calibration is of a model with other layers or heads.
    """
    moh, model = config.moh, config.model
    shape = (len(calibration.removal), {len(rises) for rises in calibration.removal})
    if shape != (model.num_layers, {model.num_attention_heads}):
        raise UserError(
            f"the calibration must be of {model.num_layers} layers of {model.num_attention_heads} heads. "
            f"Got {shape[0]} of {', '.join(map(str, sorted(shape[1])))}. Delete its file to measure again."
        )
    assert isinstance(moh.shared_heads, int), "checked with the configuration"
    shared = calibration.shared(moh.shared_heads, routing_groups(model, moh))
    return dataclasses.replace(config, moh=dataclasses.replace(moh, shared_heads=shared, shared_placement="first"))
