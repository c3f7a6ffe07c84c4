"""A run that chooses heads in each KV group, with a budget for each layer, biases and an activation schedule."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from safetensors.torch import load_file
from support.runs import Run, command, finish
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OPTIONS = (
    "model.num_query_groups=2",
    "moh.routing_groups=kv",
    "moh.gate_softmax=group",
    "moh.shared_placement=spread",
    "moh.active_heads=[6, 4]",
    "moh.activation_schedule_steps=20",
    "moh.balancing=bias",
    "moh.bias_update_rate=0.02",
    "monitor.head_scalars=true",
)


@pytest.fixture(scope="module")
def trained(new_run: Callable[[], Run]) -> Run:
    run = new_run()
    done = run.finish(*OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_the_summary_counts_the_heads_of_all_groups_and_names_the_backend(trained: Run) -> None:
    records, summary = trained.records(), trained.json("summary.json")
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.5
    assert (summary["active_head_fraction"], summary["attention_backend"]) == (10 / 16, "slots")
    weights = load_file(trained.folder / "checkpoints/step_00000030/weights/tp_rank_00_of_02.safetensors")
    for layer in range(2):
        bias = weights[f"decoder.layers.{layer}.self_attention.router.bias_steps"]
        assert bias.shape == (6,)
        assert bias.any()


def test_the_schedule_decreases_the_heads_of_every_group_at_once(trained: Run) -> None:
    events = EventAccumulator(str(trained.folder), size_guidance={"scalars": 0})
    events.Reload()
    for layer, expected in enumerate(([4] * 20 + [3] * 10, [4] * 10 + [3] * 10 + [2] * 10)):
        loads = [
            [event.value for event in events.Scalars(f"head_load/layer_{layer:02d}/head_{head:02d}")]
            for head in range(8)
        ]
        for group in (loads[:4], loads[4:]):
            assert [sum(step) for step in zip(*group, strict=True)] == pytest.approx(expected, abs=1e-4)
            assert set(group[0]) == {1.0}, "the first head of a group is shared"


def test_a_resumed_run_repeats_its_losses(trained: Run, new_run: Callable[[], Run]) -> None:
    run = new_run()
    shutil.copytree(trained.folder, run.folder)
    for name in ("step_00000030", "step_00000020"):
        shutil.rmtree(run.folder / "checkpoints" / name)
    done = run.finish(*OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["loss"] for record in run.records()] == [record["loss"] for record in trained.records()]


@pytest.mark.parametrize("how", ["resume", "init_from", "generate", "evaluate"])
def test_the_model_is_not_loaded_with_another_choice_of_heads(
    trained: Run, new_run: Callable[[], Run], how: str
) -> None:
    other = (*OPTIONS, "moh.routing_groups=1", "moh.gate_softmax=layer")
    if how == "resume":
        done = trained.finish(*other)
    elif how == "init_from":
        done = new_run().finish(*other, f"train.init_from={trained.folder}")
    else:
        done = finish(command(f"{how}.py", trained.folder, *other[-2:]))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "step_00000030 was made with other values:" in done.stderr
    assert "moh.routing_groups: expected kv, got 1" in done.stderr
    assert "moh.gate_softmax: expected group, got layer" in done.stderr
