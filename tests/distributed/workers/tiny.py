"""A model small enough to compare all its gradients, and the steps that workers share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moh_megatron.config.load import config_from_mapping
from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, moh_layers, position_ids, token_losses
from moh_megatron.model.packing import document_ends, document_positions
from moh_megatron.moh.routing import in_groups
from moh_megatron.parallel import groups
from moh_megatron.parallel.gradients import gather_last_dimension

SEED = 11
TINY: dict[str, dict[str, Any]] = {
    "run": {"dir": "unused", "seed": SEED},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 96,
        "init_method_std": 0.1,
    },
    "moh": {"shared_heads": 2, "active_heads": 5, "balance_coefficient": 0.5},
    "data": {},
    "train": {
        "sequence_length": 32,
        "total_tokens": 4096,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
    },
    "optimizer": {"learning_rate": 1e-3, "gradient_clipping": 0.5},
    "parallel": {"zero_stage": 1},
    # Every parameter here is below DeepSpeed's threshold, and stage 3 would shard none of them.
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


def tiny_config(**sections: dict[str, Any]) -> Config:
    """Return the tiny configuration with the given values replaced."""
    merged = {name: {**values, **sections.get(name, {})} for name, values in TINY.items()}
    return config_from_mapping(merged, "test")


def tokens(rows: int, seed: int = 6) -> torch.Tensor:
    """Return token ids [rows, S + 1]."""
    return torch.randint(0, 96, (rows, 33), generator=torch.Generator().manual_seed(seed))


def fresh_model(config: Config, accumulation_steps: int = 1) -> torch.nn.Module:
    """Return a model drawn from the configuration's seed; make new process groups only if tensor parallelism changes.

    Each gloo group has its own threads, so workers should run all cases of one layout before the next.
    """
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() == config.parallel.tensor:
            torch.manual_seed(config.run.seed)
            return build_model(config, accumulation_steps)
        parallel_state.destroy_model_parallel()
    groups.initialize(config.parallel.tensor, config.run.seed)
    return build_model(config, accumulation_steps)


def _margin(router: Any, x: torch.Tensor, q: torch.Tensor) -> float:
    """Return the smallest distance between the last chosen and the first rejected routed head."""
    scores = router.selection_scores(x, q)
    if scores is None or router.top_k == scores.shape[-1]:
        return 1.0
    ordered = in_groups(scores, router.heads.groups).sort(dim=-1, descending=True).values
    k = router.top_k // router.heads.groups
    return float((ordered[..., k - 1] - ordered[..., k]).min())


def watch_routing(model: torch.nn.Module) -> list[tuple[torch.Tensor, float]]:
    """Return a list to which each layer adds its routing decision and margin."""
    seen: list[tuple[torch.Tensor, float]] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.append((output.active.detach().clone(), _margin(module, inputs[0].detach(), inputs[1].detach())))

    for layer in moh_layers(model):
        layer.router.register_forward_hook(hook)
    return seen


def gradients(model: torch.nn.Module, rows: torch.Tensor, eos_token_id: int | None = None) -> dict[str, Any]:
    """Return loss, all gradients, routing and margins of one forward and backward pass over ``rows``."""
    seen = watch_routing(model)
    set_biases(model)
    loss = mean_loss(model, rows, eos_token_id)
    loss.backward()
    decided = seen[: len(moh_layers(model))]
    return {
        "loss": loss.detach(),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "active": [active for active, _ in decided],
        "margin": min((margin for _, margin in decided), default=1.0),
        "statistics": [layer.statistics.drain(torch.device("cpu")) for layer in moh_layers(model)],
    }


def set_biases(model: torch.nn.Module) -> None:
    """Set biases, if there are any, to values that training could reach and that change the routing."""
    for number, layer in enumerate(moh_layers(model)):
        if layer.router.bias_steps is not None:
            steps = layer.router.bias_steps
            steps.copy_(torch.randint(-9, 10, steps.shape, generator=torch.Generator().manual_seed(number)))


def mean_loss(model: torch.nn.Module, rows: torch.Tensor, eos_token_id: int | None = None) -> torch.Tensor:
    """Return the mean loss of ``rows``; in float64 for a model in float64, which Megatron-core's loss would lose."""
    if next(model.parameters()).dtype != torch.float64:
        return token_losses(model, rows, eos_token_id).mean()
    inputs, labels = rows[:, :-1], rows[:, 1:]
    positions, ends = position_ids(inputs), None
    if eos_token_id is not None:
        positions, ends = document_positions(inputs, eos_token_id), document_ends(inputs, eos_token_id)
    logits = gather_last_dimension(model(inputs, positions, ends).contiguous(), groups.tp_group())
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def accumulated(config: Config, rows: torch.Tensor, steps: int) -> dict[str, Any]:
    """Return the gradients of one optimizer step over ``rows`` in ``steps`` micro-batches, scaled as in the engine."""
    model = fresh_model(config, steps)
    losses = []
    for micro_batch in rows.chunk(steps):
        loss = mean_loss(model, micro_batch)
        (loss / steps).backward()
        losses.append(loss.detach())
    return {
        "loss": torch.stack(losses).mean(),
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "statistics": [layer.statistics.drain(torch.device("cpu")) for layer in moh_layers(model)],
    }


def gradients_of(config: Config, *, double: bool = False) -> dict[str, Any]:
    """Return ``gradients`` of a fresh model over two rows; with data.document_mask, of short documents."""
    model, rows, end = fresh_model(config), tokens(2), 0
    model = model.double() if double else model
    if config.data.document_mask:
        return gradients(model, rows.where(rows > 12, end), end)
    return gradients(model, rows)


def start() -> None:
    """Join the process group that the test created."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
