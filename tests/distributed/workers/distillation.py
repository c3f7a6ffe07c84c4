"""Computes the divergence of sharded logits, and distils with the engine at each layout and in a plain loop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import engine
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moh_megatron.checkpoint import weights
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import data_parallel_size, gradient_accumulation_steps
from moh_megatron.model.build import model_arguments, moh_layers
from moh_megatron.model.divergence import distilled_losses, divergence
from moh_megatron.model.tensors import model_tensors
from moh_megatron.parallel import groups
from moh_megatron.train.engine import Engine, adamw
from moh_megatron.train.schedule import learning_rate
from moh_megatron.train.teacher import load_teacher

STEPS = 3
WEIGHT = 0.7
TEACHER_SEED = 77


def sharded_divergence() -> dict[str, Tensor]:
    """Return value and gradient from shards over both ranks, and from full logits by torch; entry 7 is padding."""
    student, teacher = (
        (3 * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))).index_fill(
            -1, torch.tensor([7]), -torch.inf
        )
        for seed in (1, 2)
    )
    upstream = torch.rand(3, 5, generator=torch.Generator().manual_seed(3))
    rank, size = dist.get_rank(), dist.get_world_size()
    own = student.chunk(size, -1)[rank].clone().requires_grad_()
    value = divergence(own, teacher.chunk(size, -1)[rank], dist.group.WORLD)  # pyright: ignore[reportArgumentType]
    value.backward(upstream)
    assert own.grad is not None
    shards = [torch.empty_like(own.grad) for _ in range(size)]
    dist.all_gather(shards, own.grad.contiguous())
    full = student[..., :7].clone().requires_grad_()
    expected = F.kl_div(full.log_softmax(-1), teacher[..., :7].log_softmax(-1), log_target=True, reduction="none").sum(
        -1
    )
    expected.backward(upstream)
    assert full.grad is not None
    return {
        "value": value.detach(),
        "gradient": torch.cat(shards, -1),
        "expected_value": expected.detach(),
        "expected_gradient": F.pad(full.grad, (0, 1)),
    }


def teacher_config(parallel: dict[str, Any]) -> Config:
    return tiny.tiny_config(moh={"enabled": False}, run={"seed": TEACHER_SEED}, parallel=parallel)


def write_teacher(folder: Path) -> None:
    """Write the weights of the teacher as one file for every layout."""
    state = model_tensors(tiny.fresh_model(teacher_config({"tensor": 1})))
    if dist.get_rank() == 0:
        (folder / weights.FOLDER).mkdir(parents=True)
        weights.write_shard(folder, {name: tensor.detach() for name, tensor in state.items()}, 0, 1)
        from moh_megatron.config.load import dump_config

        (folder / "config.yaml").write_text(dump_config(teacher_config({"tensor": 1})))
    dist.barrier()


def plain_loop(config: Config) -> dict[str, list[float]]:
    """Distil in one process, with full logits and the losses of torch."""
    teacher = tiny.fresh_model(teacher_config({"tensor": 1})).eval()
    model = tiny.fresh_model(config)
    routed: list[Tensor] = []
    for layer in moh_layers(model):
        layer.router.loss_scale = 0.0
        layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output.balance_loss))
    optimizer = adamw(model, config)
    results: dict[str, list[float]] = {"losses": [], "divergences": [], "norms": []}
    for step in range(STEPS):
        batches, losses, divergences = engine.micro_batches(config, step), [], []
        for rows in batches:
            routed.clear()
            arguments = model_arguments(rows[:, :-1])
            with torch.no_grad():
                target = teacher(*arguments).log_softmax(-1)
            predicted = model(*arguments).log_softmax(-1)
            loss = F.nll_loss(predicted.flatten(0, 1), rows[:, 1:].flatten())
            distance = F.kl_div(predicted, target, log_target=True, reduction="none").sum(-1).mean()
            total = loss + WEIGHT * distance + config.moh.balance_coefficient * torch.stack(routed).mean()
            (total / len(batches)).backward()
            losses.append(loss.item())
            divergences.append(distance.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.train.steps)
        optimizer.step()
        optimizer.zero_grad()
        results["losses"].append(sum(losses) / len(losses))
        results["divergences"].append(sum(divergences) / len(divergences))
        results["norms"].append(float(norm))
    return results


def engine_loop(config: Config, teacher_folder: Path) -> dict[str, list[float]]:
    """Take the same steps as training does."""
    size = dist.get_world_size()
    accumulation, replicas = gradient_accumulation_steps(config, size), data_parallel_size(config, size)
    model = tiny.fresh_model(config, accumulation)
    trained = Engine(model, config, data_parallel=replicas, accumulation_steps=accumulation)
    before = torch.get_rng_state()
    teacher = load_teacher(teacher_folder, config, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    rank = groups.dp_group().rank()
    results: dict[str, list[float]] = {"losses": [], "divergences": [], "norms": []}
    for step in range(STEPS):
        both = []
        for rows in engine.micro_batches(config, step)[rank::replicas]:
            losses, distances = distilled_losses(trained.model, teacher, rows)
            trained.backward(losses.mean() + WEIGHT * distances.mean())
            both.append(torch.stack([losses.detach().mean(), distances.detach().mean()]))
        results["norms"].append(float(trained.step(learning_rate(config.optimizer, step, config.train.steps))))
        mean = torch.stack(both).mean(0)
        dist.all_reduce(mean, group=groups.dp_group())
        for name, value in zip(("losses", "divergences"), (mean / replicas).tolist(), strict=True):
            results[name].append(value)
    return results


if __name__ == "__main__":
    engine.join()
    folder = Path(sys.argv[1]).parent / "teacher"
    results: dict[str, Any] = {"sharded": sharded_divergence()}
    write_teacher(folder)
    results["plain"] = plain_loop(tiny.tiny_config())
    for name, parallel in engine.LAYOUTS.items():
        results[name] = engine_loop(tiny.tiny_config(parallel=parallel), folder)
    for stage in (1, 2, 3):
        sections = {"parallel": {"tensor": 2, "zero_stage": stage}, "train": {"precision": "bf16"}}
        results[f"tp2_zero{stage}_bf16"] = engine_loop(tiny.tiny_config(**sections), folder)
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
