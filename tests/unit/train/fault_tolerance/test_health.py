"""What a run says when too many steps in a row did not count."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moh_megatron.io.errors import Fault
from moh_megatron.train.fault_tolerance.health import Health

pytestmark = pytest.mark.usefixtures("one_rank")


def test_the_last_good_checkpoint_is_none_that_was_passed_over(tiny, fake_checkpoint, tmp_path):
    """Step 20 is damaged, and complete by its manifest: the run went on from step 10."""
    config = tiny({"run.dir": str(tmp_path), "train.max_bad_steps": 0})
    for step in (10, 20):
        fake_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", config, step=step)
    (tmp_path / "checkpoints" / "step_00000020" / "optimizer" / "state.pt").write_bytes(b"")
    place = SimpleNamespace(source="only", document=3, token=0)
    dataset: Any = SimpleNamespace(name="data", places=lambda sample: [place])
    control = dist.group.WORLD
    assert control is not None
    health = Health(config, dataset, control, [], lambda message: None, None)
    with pytest.raises(Fault, match=rf"Last good checkpoint: {tmp_path}/checkpoints/step_00000010\."):
        health.skipped(13, [torch.tensor(math.nan)] * 4)
