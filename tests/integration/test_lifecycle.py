"""A run that was stopped, killed, out of disk space or damaged has the curve of an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import STEPS, Run, end, gone, ranks_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NewRun = Callable[[], Run]
CURVE = ("step", "tokens", "loss", "lm_loss", "balance_loss", "grad_norm", "lr")


def curve(run: Run) -> list[tuple[Any, ...]]:
    """Return the values that do not depend on how often a run was stopped."""
    return [tuple(record[name] for name in CURVE) for record in run.records()]


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in (run.folder / "checkpoints").iterdir())


def test_finished_run_leaves_records_summary_checkpoints_and_events(uninterrupted: Run) -> None:
    records, summary = uninterrupted.records(), uninterrupted.json("summary.json")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["tokens_per_second"] > 0 for record in records)
    for record in records:
        assert record["loss"] == record["lm_loss"] + 0.01 * record["balance_loss"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert uninterrupted.json("exit.json") == {"code": 0, "reason": "finished", "step": STEPS}
    assert checkpoints(uninterrupted) == ["latest", "step_00000010", "step_00000020", "step_00000030"]
    expected = {"tensor_parallel": 2, "data_parallel": 1, "zero_stage": 1, "layers": 2, "active_head_fraction": 0.5}
    assert {name: summary[name] for name in expected} == expected
    assert summary["tokens"] == STEPS * 8 * 32
    assert summary["bigram_entropy"] < summary["unigram_entropy"]
    assert 0 < summary["val_loss"] < 6
    assert summary["sample_text"].startswith("the")

    events = EventAccumulator(str(uninterrupted.folder), size_guidance={"scalars": 0})
    events.Reload()
    lm_loss = [(event.step, event.value) for event in events.Scalars("loss/lm")]
    assert [step for step, _ in lm_loss] == list(range(1, STEPS + 1))
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("head_load/")]
    loads = json.loads((uninterrupted.folder / "head_load.json").read_text())
    assert loads["step"] == STEPS
    assert [len(heads) for heads in loads["load"]] == [8, 8]
    assert loads["load"][0][0] == 1.0
    assert abs(sum(loads["load"][0][2:]) - 2) < 1e-5


def test_two_replicas_learn_as_one_and_train_on_without_tensorboard(uninterrupted: Run, new_run: NewRun) -> None:
    """The same model and data at TP 1 x DP 2: the data of every replica counts, in training and in validation."""
    run = new_run()
    run.folder.mkdir()
    # Event files of an earlier version are moved into the run folder, where a folder is in the way of this one.
    for obstacle in ("tensorboard/events.out.tfevents.1", "events.out.tfevents.1/file"):
        (run.folder / obstacle).parent.mkdir()
        (run.folder / obstacle).touch()
    done = run.finish("parallel.tensor=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "warning: TensorBoard" in line]
    assert str(run.folder) in warning
    assert warning.endswith("Training goes on without it.")
    losses, expected = ([record["lm_loss"] for record in either.records()] for either in (run, uninterrupted))
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses == pytest.approx(expected, rel=5e-3)
    assert run.json("summary.json")["val_loss"] == pytest.approx(
        uninterrupted.json("summary.json")["val_loss"], rel=5e-3
    )


def test_document_mask_changes_the_first_loss_and_still_learns(uninterrupted: Run, new_run: NewRun) -> None:
    """The same data and weights give another loss from the first step on."""
    run = new_run()
    done = run.finish("data.document_mask=true")
    assert done.returncode == 0, done.stdout + done.stderr
    losses, unmasked = ([record["lm_loss"] for record in either.records()] for either in (run, uninterrupted))
    assert losses[0] != unmasked[0]
    assert losses[0] == pytest.approx(unmasked[0], abs=0.02)
    assert losses[-1] < losses[0] - 0.5


def test_changed_optimizer_value_is_reported_on_resume_and_takes_effect(uninterrupted: Run, new_run: NewRun) -> None:
    run = new_run()
    shutil.copytree(uninterrupted.folder, run.folder)
    for name in ("step_00000030", "step_00000020"):
        shutil.rmtree(run.folder / "checkpoints" / name)
    done = run.finish("optimizer.weight_decay=50.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "optimizer.weight_decay is 50.0 from here on; it was 0.1" in done.stderr
    assert run.records()[10]["loss"] == uninterrupted.records()[10]["loss"]
    assert run.records()[-1]["loss"] != uninterrupted.records()[-1]["loss"]


def test_run_that_was_stopped_and_then_hit_a_full_disk_finishes(uninterrupted: Run, new_run: NewRun) -> None:
    run = new_run()
    process = run.start()
    run.wait_for_step(6, process)
    code, output = end(process, signal.SIGTERM)
    assert code == 75, output
    ending = run.json("exit.json")
    assert ending["code"] == 75
    assert "SIGTERM" in ending["reason"]
    stopped_at = ending["step"]
    assert checkpoints(run)[-1] == f"step_{stopped_at:08d}"
    assert len(run.records()) == stopped_at

    full = run.finish(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert full.returncode == 1, full.stdout + full.stderr
    assert "cannot be written" in full.stderr
    assert f"Newest complete checkpoint: step_{stopped_at:08d}" in full.stderr or stopped_at >= 10
    assert "Traceback" not in full.stderr
    assert run.json("exit.json")["code"] == 1
    assert f"step_{stopped_at:08d}" in checkpoints(run)

    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert curve(run) == curve(uninterrupted)


def test_run_with_a_killed_rank_and_then_damaged_checkpoints_finishes(uninterrupted: Run, new_run: NewRun) -> None:
    run = new_run()
    process = run.start()
    run.wait_for_step(13, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert re.search("error: (rank 0 ends, because )?rank 1 was ended by SIGKILL", output), "rank 0 may report it, too"
    assert "whose message says why" not in output
    assert all(gone(rank) for rank in ranks)
    ending = run.json("exit.json")
    assert (ending["code"], ending["reason"].rstrip(".")) == (1, "rank 1 was ended by SIGKILL")

    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after step 10" in done.stderr
    assert curve(run) == curve(uninterrupted)

    newest, before = (run.folder / "checkpoints" / name for name in ("step_00000030", "step_00000020"))
    weights = next(newest.glob("weights/*.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)
    state = next(before.glob("optimizer/*.safetensors"))
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    again = run.finish()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "step_00000030 is passed over" in again.stderr
    assert "step_00000020 is passed over" in again.stderr
    assert "resumed after step 10" in again.stderr
    assert curve(run) == curve(uninterrupted)


def test_ranks_end_when_the_launcher_is_killed(new_run: NewRun) -> None:
    run = new_run()
    process = run.start()
    run.wait_for_step(2, process)
    ranks = ranks_of(process.pid)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(gone(rank) for rank in ranks):
        time.sleep(0.1)
    assert all(gone(rank) for rank in ranks)
    assert run.json("exit.json")["code"] in (0, 75)


def test_resume_refuses_other_values_and_init_from_starts_a_new_run(uninterrupted: Run, new_run: NewRun) -> None:
    refused = uninterrupted.finish("moh.active_heads=5")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "moh.active_heads: expected 4, got 5" in refused.stderr
    assert "Traceback" not in refused.stderr

    run = new_run()
    done = run.finish(
        f"train.init_from={uninterrupted.folder}",
        "parallel.tensor=1",
        f"train.total_tokens={5 * 8 * 32}",
        "optimizer.warmup_steps=0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [record["lm_loss"] for record in run.records()]
    assert len(losses) == 5
    trained = uninterrupted.records()
    assert abs(losses[0] - trained[-1]["lm_loss"]) < 0.3 < trained[0]["lm_loss"] - losses[0]
    summary = run.json("summary.json")
    assert (summary["tensor_parallel"], summary["data_parallel"]) == (1, 2)


def test_finished_run_stays_finished(uninterrupted: Run, new_run: NewRun) -> None:
    run = new_run()
    shutil.copytree(uninterrupted.folder, run.folder)
    before = json.loads(Path(run.folder / "summary.json").read_text())
    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert curve(run) == curve(uninterrupted)
    assert run.json("summary.json")["val_loss"] == before["val_loss"]
