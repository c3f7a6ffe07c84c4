"""Which rank this process is, as the variables of launchers say, and the GPU that it takes on its node."""

import os
import re

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.train.fault_tolerance.world import World


def test_each_rank_of_a_node_finds_a_gpu():
    for local_rank in range(8):
        World(8 + local_rank, 16, local_rank).require_gpu(8)


@pytest.mark.parametrize(("gpus", "seen"), [(1, "1 GPU"), (4, "4 GPUs")])
def test_more_ranks_than_gpus_are_refused(gpus, seen):
    message = f"rank 12 is number 5 on its node and sees {seen}. Start at most {gpus} ranks a node"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        World(12, 16, 4).require_gpu(gpus)


_MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
_KUBERNETES = {"RANK": "1", "WORLD_SIZE": "4", **_MEETING}
_BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **_MEETING}
_TASK = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", **_MEETING}
_OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", **_MEETING}
_OURS = re.compile("RANK$|WORLD|^MASTER_|^SLURM_|^PMI_|^MPI_|^OMPI_|^MOH_LAUNCHER")


@pytest.fixture
def environment(monkeypatch):
    """environment(values): these are the only variables of a launcher."""

    def replace(values):
        for name in filter(_OURS.search, list(os.environ)):
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return replace


@pytest.mark.parametrize(
    ("values", "world"),
    [
        ({**_KUBERNETES, "LOCAL_WORLD_SIZE": "1"}, World(1, 4, 0)),
        ({**_KUBERNETES, "RANK": "3", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0)),
        ({"WORLD_SIZE": "1"}, World(0, 1, 0)),
        (_TASK, World(0, 2, 0)),
        (_OPEN_MPI, World(3, 4, 1)),
        ({**_BATCH_SCRIPT, **_OPEN_MPI}, World(3, 4, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", **_MEETING}, World(1, 2, 0)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        ({"SLURM_NNODES": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NNODES": "2", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, None),
    ],
)
def test_what_is_missing_is_derived_where_one_value_is_possible(environment, values, world):
    environment(values)
    assert World.from_environment() == world


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_KUBERNETES, "LOCAL_RANK must be set beside RANK=1, WORLD_SIZE=4, "),
        ({"RANK": "0"}, "WORLD_SIZE and LOCAL_RANK must be set beside RANK=0, "),
        ({"WORLD_SIZE": "2", **_MEETING}, "RANK and LOCAL_RANK must be set beside WORLD_SIZE=2, "),
        ({"SLURM_NNODES": "2", "SLURM_PROCID": "0"}, "SLURM_NNODES=2 gives the job 2 nodes, but no number of tasks"),
        ({"LOCAL_RANK": "0"}, "RANK and WORLD_SIZE must be set beside LOCAL_RANK=0, "),
        ({**_KUBERNETES, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE must divide WORLD_SIZE (4) "),
        ({**_KUBERNETES, "LOCAL_WORLD_SIZE": "0"}, "the environment variable LOCAL_WORLD_SIZE must be a whole number"),
        ({**_KUBERNETES, "LOCAL_RANK": "0", "RANK": ""}, "the environment variable RANK must be a whole number"),
        ({**_KUBERNETES, "LOCAL_RANK": "zero"}, "the environment variable LOCAL_RANK must be a whole number"),
        ({**_KUBERNETES, "LOCAL_RANK": "-1"}, "the environment variable LOCAL_RANK must be a whole number"),
        ({**_KUBERNETES, "LOCAL_RANK": "0", "RANK": "4"}, "the environment variable RANK must be below WORLD_SIZE (4)"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "the environment variable WORLD_SIZE must be a whole"),
        ({**_KUBERNETES, "LOCAL_RANK": "0", "MASTER_ADDR": " "}, "MASTER_ADDR must be set for 4 ranks to meet"),
        ({**_KUBERNETES, "LOCAL_RANK": "0", "MASTER_PORT": ""}, "MASTER_PORT must be set for 4 ranks to meet"),
        ({**_KUBERNETES, "LOCAL_RANK": "0", "MASTER_PORT": "70000"}, "the environment variable MASTER_PORT must be a"),
        (_BATCH_SCRIPT, "SLURM_NTASKS=2 asks for 2 tasks, but this process is none of them"),
        ({**_BATCH_SCRIPT, "SLURM_STEP_ID": str(2**32 - 6)}, "SLURM_NTASKS=2 asks for 2 tasks, but this process is"),
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2 asks for 2 tasks, but this process is none of them"),
        ({**_TASK, "SLURM_PROCID": ""}, "the environment variable SLURM_PROCID must be a whole number"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, "SLURM_PROCID and SLURM_LOCALID must be set beside SLURM_NTASKS"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_LOCAL_RANK must be set beside OMPI_"),
    ],
)
def test_half_an_environment_is_refused_and_what_is_missing_named(environment, values, message):
    environment(values)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        World.from_environment()


def test_ranks_to_start_need_no_launcher_and_contradict_one_that_made_this_process_a_rank(environment):
    environment(_BATCH_SCRIPT)
    assert World.from_environment(2) is None
    environment({"RANK": "0", "WORLD_SIZE": "1"})
    with pytest.raises(UserError, match=r"^--nproc-per-node 8 starts ranks, but RANK=0, WORLD_SIZE=1 in the"):
        World.from_environment(8)
    own = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **_MEETING}
    environment({**own, "MOH_LAUNCHER_PID": "77"})
    assert World.from_environment(2) == World(1, 2, 1)
    environment({**own, "LOCAL_WORLD_SIZE": "2"})
    assert World.from_environment(2) == World(1, 2, 1)
