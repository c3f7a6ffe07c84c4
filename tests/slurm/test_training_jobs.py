"""sbatch slurm/pretrain_moh.sh trains as the same command does without Slurm, and recovers from faults."""

from __future__ import annotations

import json
import signal

import pytest
from cluster import wait_for
from jobs import INTERVAL, LONG, LONG_STEPS, STRICT, curve, signalled

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_job_on_one_node_matches_a_run_without_slurm(new_job, undisturbed):
    job = new_job()
    job.submit(overrides=LONG)
    assert job.wait() == "COMPLETED", job.log
    assert curve(job.run) == curve(undisturbed)
    assert job.events() == ["start", "finished"]
    snapshot = json.loads((job.run.folder / f"slurm/{job.id}.0/job.json").read_text())
    assert snapshot["nodes"] == ["n1"]
    assert snapshot["environment"]["MASTER_ADDR"] == "127.0.0.1"
    assert snapshot["packages"]["torch"]


def test_job_on_two_nodes_matches_a_run_without_slurm(new_job, four_ranks):
    job = new_job()
    job.submit("--nodes=2")
    assert job.wait() == "COMPLETED", job.log
    assert curve(job.run) == curve(four_ranks)
    assert "2 nodes, 4 ranks are fit" in job.log
    assert float(job.log.split("their sums took ")[1].split()[0]) < 30


def test_signal_before_the_time_limit_saves_and_resumes(new_job, undisturbed):
    job = new_job()
    job.submit("--nodes=2", "--ntasks-per-node=1", "--time=60", "--signal=USR1@540", overrides=LONG)
    job.wait_for_step(LONG_STEPS // 3)
    # Slurm checks every half a minute, and sends the signal up to a minute early; a fast machine could have finished.
    with job.held(1) as rank:
        job.cluster.client("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
        wait_for("the signal", lambda: signalled(rank, signal.SIGUSR1), 150, lambda: job.log)
        # One signal is enough.
        job.cluster.client("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")
    job.wait_for_event("saved")
    assert job.wait() == "COMPLETED", job.log
    assert set(job.events()) == {"start", "saved", "finished"}
    saved = [line for line in job.history() if line[3] == "saved"]
    assert "USR1" in saved[0][7]
    assert job.resumed() == [int(line[5]) for line in saved]
    assert curve(job.run) == curve(undisturbed)


def test_killed_rank_restarts_the_job(new_job, undisturbed):
    job = new_job()
    job.submit("--nodes=2", "--ntasks-per-node=1", overrides=(*STRICT, "train.timeout_seconds=30"))
    job.wait_for_step(LONG_STEPS // 3)
    job.kill_rank(1)
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "fault", "start", "finished"]
    fault = job.history()[1]
    assert fault[6] == "n2"
    assert "rank 1 (n2" in fault[7]
    assert job.resumed()[0] % INTERVAL == 0
    assert job.repeated() <= INTERVAL
    assert curve(job.run) == curve(undisturbed)


def test_crashed_node_restarts_the_job(cluster, new_job, undisturbed):
    job = new_job()
    job.submit("--nodes=2", "--ntasks-per-node=1", overrides=(*STRICT, "train.timeout_seconds=30"))
    job.wait_for_step(LONG_STEPS // 3)
    # The node is back before Slurm notices, so only the ranks do; test_events.py has the other case.
    cluster.crash("n2")
    cluster.boot("n2")
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "fault", "start", "finished"]
    assert job.history()[1][6] == "n2"
    assert job.repeated() <= INTERVAL
    assert curve(job.run) == curve(undisturbed)


def test_invalid_configuration_is_refused(new_job):
    job = new_job()
    job.submit(overrides=("moh.active_heads=40",))
    assert job.wait() == "FAILED"
    assert "moh.active_heads" in job.log.splitlines()[-1], job.log
    assert job.cluster.job(job.id)["Restarts"] == "0"
    assert job.events() == []
