"""The GPU that a rank takes on its node."""

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
