"""Reads which rank of how many this process is from the environment that a launcher set."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moh_megatron.io.errors import UserError

PARENT_VARIABLE = "MOH_LAUNCHER_PID"
"""Our own launcher sets this variable to its process id; it reports on all ranks."""

_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun and our launcher
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)


@dataclass(frozen=True)
class World:
    """Global rank, number of ranks, and rank on this node."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> World | None:
        """Return the ranks that torchrun, srun or our launcher set; None where this process is to start the ranks.

        Raises:
            UserError: there are several ranks, but MASTER_ADDR and MASTER_PORT do not say where they meet.
        """
        for names in _LAUNCHERS:
            if all(name in os.environ for name in names):
                world = cls(*(int(os.environ[name]) for name in names))
                missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
                if world.size > 1 and missing:
                    raise UserError(
                        f"{' and '.join(missing)} must be set for {world.size} ranks to meet: "
                        f"the first node's address and a free port, the same on every rank."
                    )
                if names == _LAUNCHERS[0] or world.size > 1:
                    return world
        return None

    def require_gpu(self, gpus: int) -> None:
        """Raise UserError where this rank sees too few ``gpus``: the ranks of a node take one each, in order."""
        if self.local_rank >= gpus:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank + 1} on its node and sees {gpus} "
                f"{'GPU' if gpus == 1 else 'GPUs'}. Start at most {gpus} ranks a node (--nproc-per-node, "
                "--ntasks-per-node), or let each rank see all GPUs of its node (CUDA_VISIBLE_DEVICES; in Slurm "
                "--gpus-per-node, not --gpus-per-task)."
            )
