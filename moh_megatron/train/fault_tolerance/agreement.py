"""Ranks that would train different things are told so before the first step.

Each rank describes itself in a few hashes; those that carry one name must be equal. Of what differs, the details are
gathered in a second round.
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
from moh_megatron.data.prepared import PreparedData
from moh_megatron.io.errors import UserError

_PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "safetensors", "tokenizers", "transformers")
_SHOWN = 10
_PATIENCE_SECONDS = 15.0
"""How long a rank looks for what another one wrote: clients of a file server remember folders for some seconds."""


@dataclass(frozen=True)
class Claim:
    """What ranks must agree on: named parts, and what to do where they do not."""

    parts: dict[str, str]
    remedy: str

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr(sorted(self.parts.items())).encode()).hexdigest()


def configuration(config: Config) -> Claim:
    """Every value of the configuration."""
    sections: dict[str, dict[str, Any]] = dataclasses.asdict(config)
    parts = {f"{section}.{key}": str(value) for section, values in sections.items() for key, value in values.items()}
    return Claim(parts, "Start every rank with the same file and the same overrides.")


def software() -> Claim:
    """Versions of Python and of the packages that compute, read or write what a run is made of."""
    versions = {package: version(package) for package in _PACKAGES}
    return Claim(versions | {"python": platform.python_version()}, "Install the same versions on every node.")


def dataset(data: PreparedData) -> Claim:
    """The hashes of the prepared data of each source."""
    parts = {
        f"{source.name}/{record.path}": record.sha256[:12]
        for source in data.sources
        for record in (*source.manifest.train.files, *source.manifest.validation.files)
    }
    return Claim(parts, "Give every node the same copy of the prepared data.")


def checksums(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A checksum of the bits of each parameter: computed where it lies, moved over in one transfer."""
    names, sums = [], []
    for name, parameter in parameters:
        bits = parameter.detach().flatten().view(_INTEGERS[parameter.element_size()])
        names.append(name)
        # Weighted by position within a period, so that values that changed places differ.
        sums.append(torch.stack([bits[start::3].sum(dtype=torch.int64) for start in range(3)]))
    if not sums:
        return {}
    return {name: str(values) for name, values in zip(names, torch.stack(sums).tolist(), strict=True)}


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights(model: torch.nn.Module, whole: Iterable[tuple[str, Tensor]], tensor_rank: int) -> dict[str, Claim]:
    """Replicas agree on all weights of their tensor-parallel rank, all ranks on those that are not sharded.

    ``whole``: the tensors of ``model`` by name, as ZeRO stage 3 must gather them.
    """
    remedy = "Start from one copy of the weights that every node sees; if they were equal, a device computes wrongly."
    found = checksums(whole)
    sharded = {name for name, p in model.named_parameters() if getattr(p, "tensor_model_parallel", False)}
    return {
        f"the weights of tensor-parallel rank {tensor_rank}": Claim(found, remedy),
        "the replicated weights": Claim({name: found[name] for name in found.keys() - sharded}, remedy),
    }


def run_folder(mark: Path, patience: float = _PATIENCE_SECONDS) -> Claim:
    """Whether this rank sees ``mark``, which the first one left in the run folder."""
    deadline = time.monotonic() + patience
    while not (there := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = "seen" if there else "not seen"
    return Claim({f"what rank 0 wrote to {mark.parent}": seen}, "run.dir must be on a disk that all nodes share.")


def require_shared(folder: Path) -> None:
    """Every rank calls it. Raises UserError on all of them where one has another ``folder`` of that name."""
    mark = [folder / f".seen_by_all_{secrets.token_hex(8)}"]
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark[0].touch()
    dist.broadcast_object_list(mark, src=0)
    try:
        require_agreement({"the run folder": run_folder(mark[0])})
    finally:
        if dist.get_rank() == 0:
            mark[0].unlink(missing_ok=True)


def require_agreement(claims: dict[str, Claim], group: dist.ProcessGroup | None = None) -> None:
    """Every rank of ``group`` calls it. Raises UserError on all of them where claims of one name differ."""
    everyone = _gather({name: claim.hash for name, claim in claims.items()}, group)
    names = sorted({name for each in everyone for name in each})
    differing = [name for name in names if len({each[name] for each in everyone if name in each}) > 1]
    if not differing:
        return
    details = _gather({name: claims[name].parts for name in differing if name in claims}, group)
    remedies = _gather({name: claim.remedy for name, claim in claims.items()}, group)
    lines = []
    for name in differing:
        lines.append(f"the ranks do not agree on {name}:")
        held = {rank: parts[name] for rank, parts in enumerate(details) if name in parts}
        lines += [f"  {line}" for line in _differences(held)]
        lines.append(next(each[name] for each in remedies if name in each))
    raise UserError("\n".join(lines))


def _gather(own: dict[str, Any], group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(everyone, own, group=group)
    return everyone


def _differences(held: dict[int, dict[str, str]]) -> list[str]:
    lines = []
    for part in sorted({part for parts in held.values() for part in parts}):
        ranks: dict[str, list[int]] = {}
        for rank, parts in held.items():
            ranks.setdefault(parts.get(part, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = (f"{value} on rank {', '.join(map(str, who))}" for value, who in ranks.items())
            lines.append(f"{part}: {'; '.join(values)}")
    return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])
