"""Resumes training on two ranks at the same topology in every stage and precision, and at other topologies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import config_of, differing, save, start_engine, train
from support.layouts import GROUPED
from transformers import LlamaConfig, LlamaForCausalLM

from moh_megatron.checkpoint import save as save_module
from moh_megatron.checkpoint.hf.hf_import import hf_to_megatron
from moh_megatron.checkpoint.layout import read_config
from moh_megatron.config.load import config_from_mapping, mapping_of
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault
from moh_megatron.train.engine import initialize_distributed
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.upcycle.routers import initial_routers

SAME = [
    (tensor, stage, precision)
    for tensor in (1, 2)
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3)))
    for stage in stages
]
OFFLOAD: dict[str, Any] = {"offload_optimizer": True}
SAME_WITH: dict[str, Config] = {
    **{f"offload_zero{stage}": config_of(1, stage, parallel=OFFLOAD) for stage in (1, 2, 3)},
    **{f"offload_zero{stage}_bf16": config_of(1, stage, "bf16", parallel=OFFLOAD) for stage in (1, 2, 3)},
    "bias": config_of(1, 1, moh={"balancing": "bias", "bias_update_rate": 0.05}),
    "sequence": config_of(2, 1, parallel={"sequence": True}),
    "sequence_zero3_bf16": config_of(2, 3, "bf16", parallel={"sequence": True}),
    "grouped": config_of(2, 1, "fp32", None, **GROUPED),
    "grouped_zero3_bf16": config_of(2, 3, "bf16", None, **GROUPED),
}
CHAINS = {
    "fp32": [(2, 1), (1, 2), (1, 3), (2, 3), (1, 0), (2, 2)],
    "bf16": [(2, 1), (1, 2), (1, 3), (2, 3), (1, 1), (2, 2)],
    "fp32_grouped": [(2, 1), (1, 2), (1, 3), (2, 3), (1, 0), (2, 2)],
}
"""Tensor-parallel sizes and ZeRO stages; with _grouped, heads are chosen in KV groups."""


def same_topology(root: Path) -> dict[Any, Any]:
    """Return steps 2 to 4 of a run that continued, and of one that was resumed from a checkpoint."""
    curves = {}
    for case, config in ({case: config_of(*case) for case in SAME} | SAME_WITH).items():
        engine = start_engine(config)
        train(engine, config, 0, 2)
        folder = save(engine, config, root / str(case), 2)
        continued = train(engine, config, 2, 5)
        curves[case] = continued, train(start_engine(config, folder), config, 2, 5)
    return curves


def chain(root: Path, case: str) -> dict[str, list[Any]]:
    """Take two steps at each layout of ``CHAINS``, passing the checkpoint on, and as many steps at one layout.

    "changed" names the tensors that change when a checkpoint is loaded and saved again at another layout.
    """
    layouts, precision, sections = CHAINS[case], case.removesuffix("_grouped"), GROUPED if "grouped" in case else {}
    config = config_of(*layouts[0], precision, **sections)
    continued = train(start_engine(config), config, 0, 2 * len(layouts))
    changing, changed, folder = [], [], None
    for index, layout in enumerate(layouts):
        config = config_of(*layout, precision, **sections)
        engine = start_engine(config, folder)
        if folder is not None:
            again = save(engine, config, root / f"again_{case}_{index}", 2 * index)
            changed += [f"{layout}: {name}" for name in differing(folder, again)]
        changing += train(engine, config, 2 * index, 2 * index + 2)
        folder = save(engine, config, root / f"chain_{case}", 2 * index + 2)
    return {"continued": continued, "changing": changing, "changed": changed}


OTHER_WAYS: dict[str, dict[str, Any]] = {
    "sequence": {"parallel": {"tensor": 2, "zero_stage": 1, "sequence": True}},
    "offload": {"parallel": {"tensor": 2, "zero_stage": 1, "offload_optimizer": True}},
    "recompute": {"train": {"precision": "fp32", "micro_batch_size": 1, "recompute": "full"}},
    "deepspeed": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1000, "contiguous_gradients": False}}},
}


def other_ways(root: Path) -> dict[str, Any]:
    """Take two steps after a checkpoint, with its own settings and with each other way to compute the same."""
    config = config_of(2, 1)
    engine = start_engine(config)
    train(engine, config, 0, 2)
    folder = save(engine, config, root / "ways", 2)
    curves = {"continued": train(engine, config, 2, 4)}
    for name, sections in OTHER_WAYS.items():
        parts = {"parallel": {"tensor": 2, "zero_stage": 1}, "train": {"precision": "fp32", "micro_batch_size": 1}}
        other = tiny.tiny_config(**{**parts, **sections})
        curves[name] = train(start_engine(other, folder), other, 2, 4)
    return curves


IMPORTED = [(1, 2, 3), (2, 1, 3), (2, 2, 1)]
"""Tensor-parallel size of the checkpoint, and of the run; ZeRO stage."""


def imported(root: Path) -> dict[str, Any]:
    """Return loss and gradient norm of the first step of an imported LLaMA whose vocabulary needs padding at TP 2, and
    those of transformers."""
    sizes = tiny.TINY["model"]
    if dist.get_rank() == 0:
        torch.manual_seed(3)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=131,
                hidden_size=sizes["hidden_size"],
                intermediate_size=sizes["ffn_hidden_size"],
                num_hidden_layers=sizes["num_layers"],
                num_attention_heads=sizes["num_attention_heads"],
                num_key_value_heads=sizes["num_query_groups"],
                initializer_range=0.15,
            )
        ).save_pretrained(root / "llama")
        for saved_tensor in (1, 2):
            overrides = [f"parallel.tensor={saved_tensor}"]
            hf_to_megatron(root / "llama", root / f"tp{saved_tensor}", None, overrides, new_tensors=initial_routers)
    dist.barrier()
    curves = {}
    for saved_tensor, tensor, stage in IMPORTED:
        source, padding = root / f"tp{saved_tensor}", tensor - 1
        stated = mapping_of(config_of(tensor, stage, moh={"enabled": False}))
        stated["model"] = mapping_of(read_config(source))["model"]
        stated["model"] |= {"vocab_size": 131 + padding, "vocab_padding": padding}
        config = config_from_mapping(stated, "test")
        curves[saved_tensor, tensor, stage] = train(start_engine(config, source, resume=False), config, 0, 1)
    model, rows = LlamaForCausalLM.from_pretrained(root / "llama"), tiny.tokens(4, seed=100)
    loss = F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"ours": curves, "expected": (float(loss), float(norm))}


def one_rank_fails(root: Path) -> str:
    """Return the message of this rank when rank 1 cannot write."""
    config = config_of(2, 1)
    engine = start_engine(config)
    train(engine, config, 0, 1)
    write_part = save_module.write_part

    def refuse(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        save_module.write_part = refuse
    try:
        save(engine, config, root / "fails", 1)
    except Fault as error:
        return str(error)
    finally:
        save_module.write_part = write_part
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World.from_environment()
    assert world is not None
    initialize_distributed(world)
    result = Path(sys.argv[1])
    results = {
        "same": same_topology(result.parent),
        "chain": {case: chain(result.parent, case) for case in CHAINS},
        "ways": other_ways(result.parent),
        "imported": imported(result.parent),
        "fault": one_rank_fails(result.parent),
    }
    torch.save(results, result)
    dist.destroy_process_group()
