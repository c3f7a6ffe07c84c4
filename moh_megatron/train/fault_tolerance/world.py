"""Reads which rank of how many this process is from the environment that a launcher set."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moh_megatron.io.errors import UserError

PARENT_VARIABLE = "MOH_LAUNCHER_PID"
"""Our own launcher sets this variable to its process id; it reports on all ranks."""

TOKEN_VARIABLE = "MOH_RUN_TOKEN"
"""A secret of one job, in every key of ours in the run's store: who does not know it cannot speak to the ranks."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # torchrun, our launcher and the operators of Kubernetes
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH and Intel MPI
)
_LARGEST_SLURM_STEP = 0xFFFFFFF0
"""Larger numbers of steps are no steps of srun: the batch script's, and the shell's of salloc."""
_LARGEST_PORT = 65535


@dataclass(frozen=True)
class World:
    """Global rank, number of ranks, and rank on this node."""

    rank: int
    size: int
    local_rank: int

    @classmethod
    def from_environment(cls, to_start: int | None = None) -> World | None:
        """Return the ranks that torchrun, srun, mpirun or our launcher set; None where this process starts the ranks.

        Args:
            to_start: how many ranks the user asks this process to start (--nproc-per-node); None means not said.

        Raises:
            UserError: the variables say that there are several ranks, but not without doubt which one this is or where
                they meet; or they contradict ``to_start``.
        """
        if to_start is not None and "RANK" not in os.environ:
            return None
        world = _torchrun_world(os.environ)
        if world is not None:
            _refuse_to_start(to_start, os.environ)
        else:
            world = _mpi_world(os.environ) or _slurm_world(os.environ)
            if world is None:
                _refuse_half_of_mpi(os.environ)
        if world is not None and world.size > 1:
            _require_meeting_point(world.size, os.environ)
        return world

    def require_gpu(self, gpus: int) -> None:
        """Raise UserError where this rank sees too few ``gpus``: the ranks of a node take one each, in order."""
        if self.local_rank >= gpus:
            raise UserError(
                f"rank {self.rank} is number {self.local_rank + 1} on its node and sees {gpus} "
                f"{'GPU' if gpus == 1 else 'GPUs'}. Start at most {gpus} ranks a node (--nproc-per-node, "
                "--ntasks-per-node), or let each rank see all GPUs of its node (CUDA_VISIBLE_DEVICES; in Slurm "
                "--gpus-per-node, not --gpus-per-task)."
            )


def _torchrun_world(environment: Mapping[str, str]) -> World | None:
    """The world of torchrun's variables; what is missing is derived where only one value is possible."""
    if not any(name in environment for name in _TORCHRUN):
        return None
    present = {
        name: _number(name, environment, least=1 if name == "WORLD_SIZE" else 0)
        for name in _TORCHRUN
        if name in environment
    }
    if present.get("WORLD_SIZE") == 1:
        present = {"RANK": 0, "LOCAL_RANK": 0} | present
    if "LOCAL_RANK" not in present and {"RANK", "WORLD_SIZE"} <= present.keys() and "LOCAL_WORLD_SIZE" in environment:
        # Launchers number the ranks node by node.
        on_node = _number("LOCAL_WORLD_SIZE", environment, least=1)
        if present["WORLD_SIZE"] % on_node:
            raise UserError(
                f"LOCAL_WORLD_SIZE must divide WORLD_SIZE ({present['WORLD_SIZE']}) where LOCAL_RANK is not set. "
                f"Got {on_node}. Set LOCAL_RANK to the number of this rank on its node, from 0."
            )
        present["LOCAL_RANK"] = present["RANK"] % on_node
    if missing := [name for name in _TORCHRUN if name not in present]:
        remedies = {
            "RANK": "RANK to the number of this rank among all, from 0",
            "WORLD_SIZE": "WORLD_SIZE to the number of all ranks",
            "LOCAL_RANK": "LOCAL_RANK to the number of this rank on its node, from 0 (or LOCAL_WORLD_SIZE to the "
            "number of ranks on each node: 1 where each pod is one rank)",
        }
        found = ", ".join(f"{name}={environment[name]}" for name in _TORCHRUN if name in environment)
        raise UserError(
            f"{' and '.join(missing)} must be set beside {found}, which makes this process one rank of several. Set "
            f"{'; '.join(remedies[name] for name in missing)}. Or unset all of {', '.join(_TORCHRUN)}: this process "
            "then starts the ranks of its node itself (--nproc-per-node)."
        )
    return _world(_TORCHRUN, present)


def _slurm_world(environment: Mapping[str, str]) -> World | None:
    """The world of a task of srun; None where there is one task, such as a shell inside an allocation."""
    rank, size, _ = _SLURM
    if size not in environment:
        nodes = environment.get("SLURM_NNODES", "1")
        if nodes != "1":
            raise UserError(
                f"SLURM_NNODES={nodes} gives the job {nodes} nodes, but no number of tasks (--ntasks-per-node), so "
                "that this process would train on this node alone. Start it with srun, one rank a task; or say "
                "--nproc-per-node N, which starts N ranks on this node."
            )
        return None
    if _number(size, environment, least=1) == 1:
        return None
    tasks = environment[size]
    present = {name: _number(name, environment) for name in _SLURM if name in environment}
    # A batch script has the number 0 of its own, whichever number its tasks will have.
    step = environment.get("SLURM_STEP_ID", "" if present.get(rank, 0) == 0 else "0")
    if not re.fullmatch("[0-9]{1,10}", step) or int(step) >= _LARGEST_SLURM_STEP:
        raise UserError(
            f"{size}={tasks} asks for {tasks} tasks, but this process is none of them: it runs in the script or the "
            "shell of the job. Start it with srun, one rank a task; or say --nproc-per-node N, which starts N ranks on "
            "this node."
        )
    if missing := [name for name in _SLURM if name not in present]:
        raise UserError(f"{' and '.join(missing)} must be set beside {size}={tasks}, as srun does. Start with srun.")
    return _world(_SLURM, present)


def _mpi_world(environment: Mapping[str, str]) -> World | None:
    """The world of a process of mpirun, which may itself run inside a job of Slurm; None where there is one process."""
    for names in _MPI:
        if all(name in environment for name in names) and _number(names[1], environment, least=1) > 1:
            return _world(names, {name: _number(name, environment) for name in names})
    return None


def _refuse_half_of_mpi(environment: Mapping[str, str]) -> None:
    for names in _MPI:
        if names[1] in environment and _number(names[1], environment, least=1) > 1:
            missing = [name for name in names if name not in environment]
            raise UserError(
                f"{' and '.join(missing)} must be set beside {names[1]}={environment[names[1]]}, as mpirun does. Start "
                "the ranks with torchrun or srun, or say --nproc-per-node N, which starts N ranks on this node."
            )


def _number(name: str, environment: Mapping[str, str], least: int = 0, most: int | None = None) -> int:
    value = environment[name]
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) < least or (most is not None and int(value) > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(
            f"the environment variable {name} must be a whole number {bounds}. Got {value!r}. The launcher sets it "
            "(torchrun, srun); where this process is to start the ranks itself, unset it."
        )
    return int(value)


def _world(names: tuple[str, str, str], values: Mapping[str, int]) -> World:
    """The world of the variables ``names``; raises UserError where a rank is not below the number of ranks."""
    rank, size, local_rank = names
    for name in (rank, local_rank):
        if values[name] >= values[size]:
            raise UserError(
                f"the environment variable {name} must be below {size} ({values[size]}). Got {values[name]}. Ranks "
                "count from 0."
            )
    return World(values[rank], values[size], values[local_rank])


def _refuse_to_start(to_start: int | None, environment: Mapping[str, str]) -> None:
    """Raise UserError where a process that another launcher made a rank is told to start others."""
    if to_start is None or PARENT_VARIABLE in environment or environment.get("LOCAL_WORLD_SIZE") == str(to_start):
        return
    found = ", ".join(f"{name}={environment[name]}" for name in _TORCHRUN if name in environment)
    raise UserError(
        f"--nproc-per-node {to_start} starts ranks, but {found} in the environment make this process a rank already. "
        "Leave --nproc-per-node out, or unset these variables to start the ranks of this node only."
    )


def _require_meeting_point(ranks: int, environment: Mapping[str, str]) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be set for {ranks} ranks to meet: "
            f"the first node's address and a free port, the same on every rank."
        )
    _number("MASTER_PORT", environment, least=1, most=_LARGEST_PORT)
