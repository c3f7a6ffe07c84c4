"""Which rank of how many this process is, told by the environment of a launcher."""

from __future__ import annotations

import os
from dataclasses import dataclass

from moh_megatron.io.errors import UserError

PARENT_VARIABLE = "MOH_LAUNCHER_PID"
"""Set by our own launcher: the process that reports on all ranks."""

_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun's names, ours too
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
        """The place that torchrun, srun or our launcher gave this process; None if it is to start ranks itself.

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
        """Raise UserError where the ``gpus`` this rank sees leave none for it: ranks of a node take them in turn."""
        if self.local_rank >= gpus:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank + 1} on its node and sees {gpus} "
                f"{'GPU' if gpus == 1 else 'GPUs'}. Start at most {gpus} ranks a node (--nproc-per-node, "
                "--ntasks-per-node), or let each rank see all GPUs of its node (CUDA_VISIBLE_DEVICES; in Slurm "
                "--gpus-per-node, not --gpus-per-task)."
            )
