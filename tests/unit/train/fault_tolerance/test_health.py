"""Which losses are spikes, and the message when too many steps in a row were skipped."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moh_megatron.io.errors import Fault
from moh_megatron.train.fault_tolerance.health import Health, SpikeDetector

WINDOW = [4.0, 4.2, 3.8, 4.1, 3.9]


def test_score_is_the_z_score_over_the_window():
    detector = SpikeDetector(3.0, 5, WINDOW)
    mean, deviation = 4.0, math.sqrt(0.02)
    assert detector.score(mean + 2.9 * deviation) is None
    assert detector.score(mean + 3.1 * deviation) == pytest.approx(3.1)
    assert detector.score(mean - 9 * deviation) is None, "a lower loss is no spike"


def test_no_loss_is_a_spike_before_the_window_is_full():
    detector = SpikeDetector(3.0, 5, WINDOW[:4])
    assert detector.score(100.0) is None
    detector.add(4.0)
    assert detector.score(100.0) is not None


def test_window_drops_old_losses_and_ignores_infinite_ones():
    detector = SpikeDetector(3.0, 5, WINDOW)
    for _ in range(5):
        detector.add(9.0)
    detector.add(math.nan)
    detector.add(math.inf)
    assert detector.score(9.0) is None
    assert detector.score(9.1) == math.inf, "all losses of the window are equal"


def test_detector_without_a_zscore_finds_no_spike():
    detector = SpikeDetector(None, 5, WINDOW)
    assert detector.score(1e9) is None


@pytest.mark.usefixtures("one_rank")
def test_fault_names_the_checkpoint_of_this_run_and_no_later_damaged_one(tiny, fake_checkpoint, tmp_path):
    """Step 20 is complete by its manifest, but damaged: the run went on from step 10."""
    config = tiny({"run.dir": str(tmp_path), "train.max_bad_steps": 0})
    for step in (10, 20):
        fake_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", config, step=step)
    (tmp_path / "checkpoints" / "step_00000020" / "optimizer" / "state.pt").write_bytes(b"")
    document = SimpleNamespace(source="only", document=3, token=0)
    dataset: Any = SimpleNamespace(name="data", documents=lambda sample: [document])
    control = dist.group.WORLD
    assert control is not None
    health = Health(config, dataset, control, [], None)
    with pytest.raises(Fault, match=rf"Last good checkpoint: {tmp_path}/checkpoints/step_00000010\."):
        health.skipped(13, [torch.tensor(math.nan)] * 4)
