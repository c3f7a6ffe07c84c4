"""status.sh: its report on a run folder whose job runs, waits or has ended."""

from __future__ import annotations

import json

import pytest

METRICS = {"step": 120, "loss": 2.5, "tokens": 30720, "tokens_per_second": 1024.0041}
HISTORY = [
    ("start", "-", "-", "n1,n2", "CONFIG"),
    ("fault", "1", "50", "n2", "rank 1 is missing"),
    ("start", "-", "50", "n1,n2", "CONFIG"),
]


@pytest.fixture
def folder(job):
    (job.run / "slurm").mkdir()
    lines = ["\t".join(("2026-01-01T00:00:00", "7", str(number // 2), *rest)) for number, rest in enumerate(HISTORY)]
    (job.run / "slurm/history.tsv").write_text("\n".join(lines) + "\n")
    (job.run / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    (job.run / "config.yaml").write_text("train:\n  total_tokens: 7403520\n")
    (job.run / "checkpoints").mkdir()
    (job.run / "checkpoints/latest").write_text("step_00000100\n")
    return job.run


def rows(job, **variables: str) -> dict[str, str]:
    done = job.type("status.sh", str(job.run), **variables)
    assert done.returncode == 0, done.stderr
    return {line[:19].strip(): line[19:] for line in done.stdout.splitlines()}


def test_running_job_is_shown_with_progress(job, folder):
    assert rows(job, QUEUE="RUNNING|1:02:03|n[1-2]|None") == {
        "state": "RUNNING on n[1-2]",
        "job": "7",
        "restarts": "1 (1 after faults)",
        "step": "120, 30720 of 7403520 tokens",
        "tokens/s": "1024.0",
        "left to train": "2:00:00",
        "left of the job": "1:02:03",
        "last checkpoint": "step_00000100",
    }


def test_pending_job_is_shown_with_its_reason(job, folder):
    assert rows(job, QUEUE="PENDING|1-00:00:00||Resources")["state"] == "PENDING (Resources)"


def test_ended_job_is_shown_with_its_reason(job, folder):
    with (folder / "slurm/history.tsv").open("a") as stream:
        stream.write("2026-01-01T00:00:00\t7\t1\tfault\t1\t120\t-\ta disk is full\n")
    found = rows(job)
    assert found["state"] == "fault, exit code 1: a disk is full"
    assert found["restarts"] == "1 (2 after faults)"
    assert found["left of the job"] == "none"


@pytest.mark.parametrize(
    ("variables", "state"),
    [
        ({}, "lost: it told no end, and Slurm does not know it any more"),
        (
            {"QUEUE": "FAILED|0:00|n1|NonZeroExitCode", "QUEUED_AS": "all"},
            "lost: it told no end, and Slurm says FAILED",
        ),
        ({"REFUSED": "squeue"}, "it told no end yet, and Slurm does not answer: squeue: error: refused"),
    ],
)
def test_job_without_a_recorded_end_is_shown_as_lost(job, folder, variables, state):
    assert rows(job, **variables)["state"] == state


def test_missing_run_folder_is_refused(job):
    done = job.type("status.sh", str(job.run / "waits"))
    assert done.returncode == 2
    assert f"{job.run}/waits: expected a run folder, and there is none: a job makes it when it starts" in done.stderr


def test_run_folder_without_a_job_is_refused(job):
    done = job.type("status.sh", str(job.run))
    assert done.returncode == 2
    assert "no job has trained in this folder" in done.stderr


def test_control_characters_of_a_reason_are_not_obeyed(job, folder):
    with (folder / "slurm/history.tsv").open("a") as stream:
        stream.write("2026-01-01T00:00:00\t7\t1\tfault\t1\t120\t-\tof é\x1b[2J\x07\n")
    assert rows(job)["state"] == "fault, exit code 1: of é?[2J?"
