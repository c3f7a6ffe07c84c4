"""A run of two replicas with biases in place of a balance loss, spread shared heads and an activation schedule."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.runs import Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from moh_megatron.checkpoint.hf.convert import megatron_to_hf

OPTIONS = (
    "parallel.tensor=1",
    "moh.balancing=bias",
    "moh.bias_update_rate=0.02",
    "moh.shared_heads=4",
    "moh.shared_placement=spread",
    "moh.active_heads=75%",
    "moh.activation_schedule_steps=20",
    "monitor.head_scalars=true",
)


@pytest.fixture(scope="module")
def trained(new_run: Callable[[], Run]) -> Run:
    run = new_run()
    done = run.finish(*OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "heads, interleaved, every layer: 6 of 8 active, 4 of them shared" in done.stderr
    assert [line for line in done.stderr.splitlines() if "warning" in line.lower()] == []
    return run


def biases(checkpoint: Path) -> list[Tensor]:
    weights = load_file(checkpoint / "weights" / "tp_rank_00_of_01.safetensors")
    return [weights[f"decoder.layers.{layer}.self_attention.router.bias_steps"] for layer in range(2)]


def test_every_step_changes_the_biases_and_adds_no_loss(trained: Run) -> None:
    records = trained.records()
    assert all(record["loss"] == record["lm_loss"] for record in records)
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    assert trained.json("summary.json")["active_head_fraction"] == 0.75
    for step, moved in zip(
        (20, 30), (biases(trained.folder / f"checkpoints/step_000000{n}") for n in (20, 30)), strict=True
    ):
        for layer in moved:
            assert layer.shape == (4,)
            assert layer.abs().max() <= step
            assert layer.any()


def test_schedule_decreases_the_active_heads_to_the_target(trained: Run) -> None:
    events = EventAccumulator(str(trained.folder), size_guidance={"scalars": 0})
    events.Reload()
    heads = [events.Scalars(f"head_load/layer_00/head_{head:02d}") for head in range(8)]
    used = [sum(head[step].value for head in heads) for step in range(30)]
    assert [round(value) for value in used] == [8] + [8] * 9 + [7] * 10 + [6] * 10
    assert all(head.value == 1.0 for number in (0, 2, 4, 6) for head in heads[number])


def test_resumed_run_repeats_losses_and_biases(trained: Run, new_run: Callable[[], Run]) -> None:
    run = new_run()
    shutil.copytree(trained.folder, run.folder)
    for name in ("step_00000030", "step_00000020"):
        shutil.rmtree(run.folder / "checkpoints" / name)
    done = run.finish(*OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["loss"] for record in run.records()] == [record["loss"] for record in trained.records()]
    newest = "checkpoints/step_00000030"
    for resumed, expected in zip(biases(run.folder / newest), biases(trained.folder / newest), strict=True):
        assert resumed.equal(expected)


def test_exported_model_chooses_the_same_heads(trained: Run, tmp_path: Path) -> None:
    difference = megatron_to_hf(trained.folder / "checkpoints/step_00000030", tmp_path / "hf")
    assert difference is not None
    assert difference < 1e-5
