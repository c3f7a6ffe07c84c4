"""The same command with other parallelism resumes the run."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
from support.runs import STEPS, Run


def test_resume_at_another_parallelism_reshards_the_checkpoint(uninterrupted: Run, new_run: Callable[[], Run]) -> None:
    run = new_run()
    shutil.copytree(uninterrupted.folder, run.folder)
    for name in ("step_00000030", "step_00000020"):
        shutil.rmtree(run.folder / "checkpoints" / name)
    parallelism = ("parallel.tensor=1", "parallel.zero_stage=2")
    done = run.finish(*parallelism, "checkpoint.keep_last=1", "checkpoint.keep_every=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "step_00000010 was written at TP 2 x DP 1, ZeRO 1, fp32; it is resharded to TP 1 x DP 2, ZeRO 2, fp32"
        in done.stderr
    )
    resumed, expected_records = run.records(), uninterrupted.records()
    assert [record["step"] for record in resumed] == list(range(1, STEPS + 1))
    assert resumed[:10] == expected_records[:10]
    assert resumed[10]["lm_loss"] == pytest.approx(expected_records[10]["lm_loss"], rel=1e-5)
    assert resumed[10]["grad_norm"] == pytest.approx(expected_records[10]["grad_norm"], rel=1e-4)
    for record, expected in zip(resumed, expected_records, strict=True):
        assert record["lm_loss"] == pytest.approx(expected["lm_loss"], rel=5e-3)
    folders = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert folders == ["latest", "step_00000020", "step_00000030"]
    assert (run.folder / "checkpoints" / "latest").read_text() == "step_00000030\n"
