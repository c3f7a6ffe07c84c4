"""A model small enough to compare every gradient of, and the steps workers share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moh_megatron.config.load import config_from_mapping
from moh_megatron.config.schema import Config
from moh_megatron.model.build import build_model, moh_layers, token_losses
from moh_megatron.parallel import groups

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
    "train": {
        "sequence_length": 32,
        "total_tokens": 4096,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
    },
    "optimizer": {"learning_rate": 1e-3, "gradient_clipping": 0.5},
    "parallel": {"zero_stage": 1},
    # Every parameter here is below DeepSpeed's threshold, and stage 3 would share out none of them.
    "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


def tiny_config(**sections: dict[str, Any]) -> Config:
    """The tiny configuration with the given values replaced."""
    merged = {name: {**values, **sections.get(name, {})} for name, values in TINY.items()}
    return config_from_mapping(merged, "test")


def tokens(rows: int, seed: int = 6) -> torch.Tensor:
    """[rows, S + 1] token ids."""
    return torch.randint(0, 96, (rows, 33), generator=torch.Generator().manual_seed(seed))


def fresh_model(config: Config, accumulation_steps: int = 1) -> torch.nn.Module:
    """A model drawn from the configuration's seed; new process groups only where tensor parallelism changes.

    Each gloo group keeps threads of its own: workers go through all cases of one layout before the next.
    """
    if parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_world_size() == config.parallel.tensor:
            torch.manual_seed(config.run.seed)
            return build_model(config, accumulation_steps)
        parallel_state.destroy_model_parallel()
    groups.initialize(config.parallel.tensor, config.run.seed)
    return build_model(config, accumulation_steps)


def _margin(router: Any, x: torch.Tensor, q: torch.Tensor) -> float | None:
    """Smallest distance between the last chosen and the first rejected routed head; None where a rank can't know."""
    moh = router.moh
    if hasattr(router, "w_routed"):
        scores = x.float() @ router.w_routed.float().T
    elif q.shape[2] == len(router.physical_of_logical):
        scores = q.float().norm(dim=-1)[..., router.physical_of_logical][..., moh.shared_heads :]
    else:
        return None
    ordered, k = scores.sort(dim=-1, descending=True).values, moh.active_heads - moh.shared_heads
    return float((ordered[..., k - 1] - ordered[..., k]).min())


def watch_routing(model: torch.nn.Module) -> list[tuple[torch.Tensor, float | None]]:
    """A list that fills with each layer's routing decision and its margin."""
    seen: list[tuple[torch.Tensor, float | None]] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.append((output.active.detach().clone(), _margin(module, inputs[0].detach(), inputs[1].detach())))

    for layer in moh_layers(model):
        layer.router.register_forward_hook(hook)
    return seen


def gradients(model: torch.nn.Module, rows: torch.Tensor) -> dict[str, Any]:
    """Loss, every gradient, routing and margins of one forward and backward pass over ``rows``."""
    seen = watch_routing(model)
    loss = token_losses(model, rows).mean()
    loss.backward()
    decided = seen[: len(moh_layers(model))]
    return {
        "loss": loss.detach(),
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "active": [active for active, _ in decided],
        "margin": min((margin for _, margin in decided if margin is not None), default=1.0),
        "statistics": [layer.statistics.drain(torch.device("cpu")) for layer in moh_layers(model)],
    }


def start() -> None:
    """Join the process group the test made."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
