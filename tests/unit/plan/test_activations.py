"""The estimate of activations against the bytes that autograd saves on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, token_losses
from moh_megatron.parallel import groups
from moh_megatron.plan.activations import Activations, activations

Tiny = Callable[..., Config]
WITHIN = 0.08
IN_GROUPS: dict[str, Any] = {
    "model.num_query_groups": 2,
    "moh.routing_groups": "kv",
    "moh.shared_placement": "spread",
    "moh.backend": "slots",
}
SHAPE: dict[str, Any] = {
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 320,
    "model.vocab_size": 512,
    "train.sequence_length": 256,
    "train.micro_batch_size": 2,
    "train.total_tokens": 2**20,
}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A world of one rank for this module."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups.initialize(tensor_parallel=1, seed=1)
    yield
    groups.destroy()


def saved_bytes(config: Config) -> int:
    """Bytes of all storages that autograd keeps of one micro-batch, without weights and buffers."""
    model = build_model(config).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # references, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    tokens = torch.randint(
        0, config.model.vocab_size, (config.train.micro_batch_size, config.train.sequence_length + 1)
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = token_losses(model, tokens).mean()
    assert loss.requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moh.enabled": False},
        {"moh.router": "query_norm"},
        {"moh.backend": "gathered"},
        {"train.recompute": "selective"},
        {"train.recompute": "full"},
        IN_GROUPS,
        IN_GROUPS | {"moh.router": "query_norm"},
        IN_GROUPS | {"moh.active_heads": 6},
        IN_GROUPS | {"train.recompute": "selective"},
        IN_GROUPS | {"train.recompute": "full"},
    ],
    ids=str,
)
def test_layer_estimate_is_close_to_what_autograd_saves(tiny: Tiny, precision: str, changes: dict[str, Any]) -> None:
    backend = changes.get("moh.backend", "dense")
    one, two = (
        tiny({**SHAPE, "moh.backend": backend, **changes, "train.precision": precision, "model.num_layers": layers})
        for layers in (1, 2)
    )
    measured = saved_bytes(two) - saved_bytes(one)
    estimated = activations(two, backend).layers - activations(one, backend).layers
    assert estimated == pytest.approx(measured, rel=WITHIN)


def test_total_estimate_is_close_to_what_autograd_saves(tiny: Tiny) -> None:
    config = tiny({**SHAPE, "moh.backend": "dense"})
    assert activations(config, "dense").total == pytest.approx(saved_bytes(config), rel=WITHIN)


def test_slots_keep_less_the_fewer_heads_are_active(tiny: Tiny) -> None:
    """Of the measured bytes, not of the estimate: queries and outputs of heads outside the slots are not kept."""
    shape = SHAPE | IN_GROUPS | {"model.num_layers": 1}
    dense, *slots = (
        saved_bytes(tiny(shape | changes))
        for changes in ({"moh.backend": "dense"}, {"moh.active_heads": 6}, {"moh.active_heads": 4})
    )
    head = 4 * 16 * 2 * 256  # one head's queries, or outputs, of 512 tokens in fp32
    # Queries before and after RoPE, outputs before and after the mask; keys before RoPE.
    of_dense_alone = 4 * 8 + 2
    assert dense - slots[0] == pytest.approx((of_dense_alone - 2 * 6) * head, rel=0.05)
    assert slots[0] - slots[1] == pytest.approx(2 * 2 * head, rel=0.2)


def test_a_schedule_keeps_most_in_its_first_steps_when_attention_is_dense(tiny: Tiny) -> None:
    shape = SHAPE | IN_GROUPS | {"moh.backend": "auto", "train.precision": "bf16"}
    scheduled = activations(tiny(shape | {"moh.activation_schedule_steps": 9}), "slots")
    assert scheduled == activations(tiny(shape | {"moh.active_heads": 8}), "slots")
    assert scheduled == activations(tiny(shape | {"moh.backend": "dense"}), "dense")
    assert scheduled.layers > 1.1 * activations(tiny(shape), "slots").layers


def parts(tiny: Tiny, **changes: Any) -> Activations:
    names = {key.replace("__", "."): value for key, value in changes.items()}
    return activations(tiny({**SHAPE, "train.precision": "bf16", **names}), "dense")


def test_full_recomputation_keeps_layer_inputs_and_one_layer(tiny: Tiny) -> None:
    none, full = parts(tiny), parts(tiny, train__recompute="full")
    assert full.layers == 2 * 2 * 512 * 128
    assert full.recomputed == none.layers // 2


def test_sequence_parallelism_shards_the_remaining_activations(tiny: Tiny) -> None:
    tensor = parts(tiny, parallel__tensor=2)
    both = parts(tiny, parallel__tensor=2, parallel__sequence=True)
    one = parts(tiny)
    assert one.layers / 2 < both.layers < tensor.layers < one.layers
    assert parts(tiny, train__micro_batch_size=1).head == one.head / 2
