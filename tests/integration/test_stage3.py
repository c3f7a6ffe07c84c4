"""ZeRO stage 3 with ZeRO-Offload, end to end: training, validation, sample, checkpoint, export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.runs import STEPS, Run, command, finish

from moh_megatron.checkpoint.layout import read_weights

pytestmark = pytest.mark.slow


def test_stage_3_learns_what_tensor_parallel_ranks_learn(uninterrupted: Run, new_run: Callable[[], Run]) -> None:
    """Two replicas that shard every parameter learn what two tensor-parallel ranks learn."""
    run = new_run()
    done = run.finish(
        "parallel.tensor=1",
        "parallel.zero_stage=3",
        "parallel.offload_optimizer=true",
        # Every parameter here is below DeepSpeed's threshold, and would not be sharded.
        "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("loss", "grad_norm"):
        values, expected = ([record[name] for record in either.records()] for either in (run, uninterrupted))
        assert values[0] == pytest.approx(expected[0], rel=1e-5)
        assert values == pytest.approx(expected, rel=5e-3)
    ours, theirs = run.json("summary.json"), uninterrupted.json("summary.json")
    assert (ours["zero_stage"], ours["data_parallel"]) == (3, 2)
    assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=5e-3)
    assert ours["sample_text"].startswith("the")
    newest = f"checkpoints/step_{STEPS:08d}"
    trained, expected_weights = (read_weights(either.folder / newest) for either in (run, uninterrupted))
    assert trained.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert (trained[name] - value).norm() < 0.05 * value.norm(), name
    exported = finish(command("convert.py", "megatron-to-hf", "--load-dir", run.folder, "--hf-dir", run.folder / "hf"))
    assert exported.returncode == 0, exported.stderr
