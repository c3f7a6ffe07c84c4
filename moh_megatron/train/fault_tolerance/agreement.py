"""Refuses, before the first step, ranks that would train different things.

Each rank describes itself by a few named hashes, and hashes of one name must be equal. Where they differ, a second
round gathers the details.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moh_megatron.config.schema import Config
from moh_megatron.data.prepared_data import PreparedData
from moh_megatron.io.errors import UserError

_PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "safetensors", "tokenizers", "transformers")
_MAX_SHOWN = 10
_VISIBLE_SECONDS = 15.0
"""How long a rank looks for a file that another one wrote: clients of a file server cache folders for some seconds."""


@dataclass(frozen=True)
class Claim:
    """Values that ranks must agree on: named parts, and the remedy where they differ."""

    parts: dict[str, str]
    remedy: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(sorted(self.parts.items())).encode()).hexdigest()


def configuration(config: Config) -> Claim:
    """Claim every value of the configuration."""
    sections: dict[str, dict[str, Any]] = dataclasses.asdict(config)
    parts = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    return Claim(parts, "Start every rank with the same file and the same overrides.")


def software() -> Claim:
    """Claim the versions of Python and of the packages that compute, read or write what a run consists of."""
    versions = {package: version(package) for package in _PACKAGES}
    return Claim(versions | {"python": platform.python_version()}, "Install the same versions on every node.")


def dataset(data: PreparedData) -> Claim:
    """Claim the hashes of the prepared data of each source."""
    parts = {
        f"{source.name}/{record.path}": record.sha256[:12]
        for source in data.sources
        for record in (*source.manifest.train.files, *source.manifest.validation.files)
    }
    return Claim(parts, "Give every node the same copy of the prepared data.")


def checksums(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Return a checksum of the bits of each parameter: computed on its device, moved to the host in one transfer."""
    names, sums = [], []
    for name, parameter in parameters:
        bits = parameter.detach().flatten().view(_INTEGERS[parameter.element_size()])
        names.append(name)
        # Three sums of every third value, so that swapped neighbours differ.
        sums.append(torch.stack([bits[start::3].sum(dtype=torch.int64) for start in range(3)]))
    if not sums:
        return {}
    return {name: str(values) for name, values in zip(names, torch.stack(sums).tolist(), strict=True)}


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights(model: torch.nn.Module, full_tensors: Iterable[tuple[str, Tensor]], tensor_rank: int) -> dict[str, Claim]:
    """Claim all weights for the replicas of a tensor-parallel rank, and those that are not sharded for all ranks.

    ``full_tensors``: the tensors of ``model`` by name, which ZeRO stage 3 must gather first.
    """
    remedy = "Start from one copy of the weights that every node sees; if they were equal, a device computes wrongly."
    found = checksums(full_tensors)
    sharded = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    return {
        f"the weights of tensor-parallel rank {tensor_rank}": Claim(found, remedy),
        "the replicated weights": Claim({name: found[name] for name in found.keys() - sharded}, remedy),
    }


def run_folder(marker: Path, timeout: float = _VISIBLE_SECONDS) -> Claim:
    """Claim whether this rank sees ``marker``, a file that rank 0 wrote to the run folder."""
    deadline = time.monotonic() + timeout
    while not (visible := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = "seen" if visible else "not seen"
    return Claim({f"what rank 0 wrote to {marker.parent}": seen}, "run.dir must be on a disk that all nodes share.")


def require_shared(folder: Path) -> None:
    """Raise UserError on all ranks where one of them sees another ``folder`` of that name; every rank calls this."""
    marker = [folder / f".seen_by_all_{secrets.token_hex(8)}"]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        marker[0].touch()
    dist.broadcast_object_list(marker, src=0)
    try:
        require_agreement({"the run folder": run_folder(marker[0])})
    finally:
        if dist.get_rank() == 0:
            marker[0].unlink(missing_ok=True)


def require_agreement(claims: dict[str, Claim], group: dist.ProcessGroup | None = None) -> None:
    """Raise UserError on all ranks of ``group`` where claims of one name differ; each of them calls this."""
    hashes = _gather({name: claim.hash for name, claim in claims.items()}, group)
    names = sorted({name for of_rank in hashes for name in of_rank})
    differing = [name for name in names if len({of_rank[name] for of_rank in hashes if name in of_rank}) > 1]
    if not differing:
        return
    details = _gather({name: claims[name].parts for name in differing if name in claims}, group)
    remedies = _gather({name: claim.remedy for name, claim in claims.items()}, group)
    lines = []
    for name in differing:
        lines.append(f"the ranks do not agree on {name}:")
        parts_of_ranks = {rank: parts[name] for rank, parts in enumerate(details) if name in parts}
        lines += [f"  {line}" for line in _differences(parts_of_ranks)]
        lines.append(next(of_rank[name] for of_rank in remedies if name in of_rank))
    raise UserError("\n".join(lines))


def _gather(own: dict[str, Any], group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, own, group=group)
    return gathered


def _differences(parts_of_ranks: dict[int, dict[str, str]]) -> list[str]:
    lines = []
    for part in sorted({part for parts in parts_of_ranks.values() for part in parts}):
        ranks: dict[str, list[int]] = {}
        for rank, parts in parts_of_ranks.items():
            ranks.setdefault(parts.get(part, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value} on rank {', '.join(map(str, numbers))}" for value, numbers in ranks.items())
            lines.append(f"{part}: {'; '.join(values)}")
    return lines[:_MAX_SHOWN] + ([f"and {len(lines) - _MAX_SHOWN} more"] if len(lines) > _MAX_SHOWN else [])
