"""Events in the life of a job: after each it finishes with the losses of an undisturbed run."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from cluster import run, wait_for
from jobs import ENVIRONMENT, INTERVAL, LONG, LONG_STEPS, SCRIPTS, STRICT, curve

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
MIDDLE = LONG_STEPS // 3
APART = ("--nodes=2", "--ntasks-per-node=1")


def test_job_requeued_by_the_user_resumes(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(overrides=LONG)
    job.wait_for_step(MIDDLE)
    cluster.client("scontrol", "requeue", str(job.id))
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "stopped", "start", "finished"]
    assert job.repeated() == 0
    assert curve(job.run) == curve(undisturbed)


def test_job_cancelled_by_the_user_saves_and_ends(cluster, new_job):
    job = new_job()
    job.submit(overrides=LONG)
    job.wait_for_step(MIDDLE)
    cluster.client("scancel", str(job.id))
    assert job.wait() == "CANCELLED"
    job.wait_for_event("stopped")
    assert json.loads((job.run.folder / "exit.json").read_text())["code"] == 75


def test_preempted_job_resumes(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(*APART, "--partition=low", overrides=LONG)
    job.wait_for_step(MIDDLE)
    other = cluster.submit("--nodes=2", "--exclusive", f"--output={job.run.folder}.other", "--wrap", "sleep 5")
    assert job.wait() == "COMPLETED", job.log
    assert cluster.job(other)["JobState"] == "COMPLETED"
    assert int(cluster.job(job.id)["Restarts"]) >= 1
    assert job.events() == ["start", "saved", "start", "finished"]
    assert job.repeated() == 0
    assert curve(job.run) == curve(undisturbed)


def test_too_short_grace_time_is_reported(cluster, new_job):
    job = new_job()
    job.submit("--partition=low", MOH_SAVE_SECONDS="600")
    assert job.wait() == "COMPLETED", job.log
    assert "waits 90 s (GraceTime)" in job.log


def test_cut_link_restarts_the_job(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(*APART, overrides=(*STRICT, "train.timeout_seconds=20"))
    job.wait_for_step(MIDDLE)
    cluster.plug("n2", "down")
    wait_for("the requeue", lambda: cluster.job(job.id)["Restarts"] == "1", 120, lambda: job.log)
    cluster.plug("n2", "up")
    assert job.wait() == "COMPLETED", job.log
    assert job.repeated() <= INTERVAL
    assert curve(job.run) == curve(undisturbed)


def test_job_survives_a_restart_of_the_controller(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(*APART, overrides=LONG)
    job.wait_for_step(MIDDLE)
    cluster.kill_controller()
    time.sleep(3)
    cluster.start_controller()
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "finished"]
    assert curve(job.run) == curve(undisturbed)


def test_job_resumes_after_slurm_loses_a_node_that_comes_back(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(*APART, overrides=STRICT)
    job.wait_for_step(MIDDLE)
    cluster.crash("n2")
    wait_for("the requeue", lambda: cluster.job(job.id)["Restarts"] == "1", 120, lambda: job.log)
    cluster.boot("n2")
    assert job.wait() == "COMPLETED", job.log
    assert job.events().count("start") == 2
    assert job.history()[1][6] == "n2"
    assert job.repeated() <= INTERVAL
    assert curve(job.run) == curve(undisturbed)


def test_job_moves_away_from_a_lost_node(cluster, new_job, undisturbed):
    job = new_job()
    job.submit(overrides=STRICT)
    job.wait_for_step(MIDDLE)
    (node,) = [line[6] for line in job.history()]
    cluster.crash(node)
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "lost", "start", "finished"]
    assert job.history()[1][6] == node
    assert job.history()[2][6] != node
    assert job.repeated() <= INTERVAL
    assert curve(job.run) == curve(undisturbed)


def test_job_of_one_or_two_nodes_resumes_on_one(cluster, new_job):
    job = new_job()
    job.submit("--nodes=1-2", overrides=STRICT)
    # Between two saves, so that the first start trains a step after the one that is resumed.
    job.wait_for_step(MIDDLE + INTERVAL // 2)
    assert cluster.job(job.id)["NumNodes"] == "2"
    cluster.crash("n2")
    time.sleep(1)
    shutil.copy(job.run.folder / "metrics.jsonl", job.run.folder / "before.jsonl")
    assert job.wait() == "COMPLETED", job.log
    assert cluster.job(job.id)["NumNodes"] == "1"
    assert job.repeated() <= INTERVAL
    (resumed,) = job.resumed()
    assert resumed % INTERVAL == 0
    before = [json.loads(line) for line in (job.run.folder / "before.jsonl").read_text().splitlines()]
    assert len(before) > resumed
    assert job.run.records()[resumed]["loss"] == pytest.approx(before[resumed]["loss"], rel=1e-5)


def test_same_failure_twice_ends_the_job(new_job):
    job = new_job()
    job.submit(overrides=("optimizer.learning_rate=1e20", "optimizer.warmup_steps=0", "train.max_bad_steps=0"))
    assert job.wait() == "FAILED"
    assert job.events() == ["start", "fault", "start", "fault"]
    assert job.log.splitlines()[-1].startswith("error: the run failed twice in the same way at step ")


def test_job_ends_after_max_restarts(cluster, new_job):
    job = new_job()
    job.submit(*APART, overrides=(*LONG, "train.timeout_seconds=30"), MAX_RESTARTS="0")
    job.wait_for_step(MIDDLE)
    job.kill_rank(1)
    assert job.wait() == "FAILED"
    assert job.events() == ["start", "fault"]
    assert "MAX_RESTARTS=0" in job.log.splitlines()[-1]


def test_second_job_on_a_run_folder_is_refused(cluster, new_job, undisturbed):
    job = new_job()
    first = job.submit(overrides=LONG)
    job.wait_for_step(1)
    second = job.submit(overrides=LONG)
    assert job.wait() == "FAILED"
    assert f"job {first} trains in this folder" in job.log.splitlines()[-1]
    assert cluster.wait(first, 400)["JobState"] == "COMPLETED"
    assert second != first
    assert curve(job.run) == curve(undisturbed)


def test_second_job_of_a_script_typed_twice_waits(cluster, new_job):
    job = new_job()
    flags = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={job.run.folder}.%j.log"]
    typed = [str(SCRIPTS / "pretrain_moh.sh"), *flags, *job.arguments()]
    job.ids += [int(cluster.client(*typed, **ENVIRONMENT).split()[-1]) for _ in range(2)]
    assert cluster.job(job.id)["Reason"] == "Dependency"
    assert job.wait() == "COMPLETED", job.log
    assert job.events() == ["start", "finished"] * 2
    shown = cluster.client(str(SCRIPTS / "status.sh"), str(job.run.folder))
    assert "30, 7680 of" in shown
    assert "step_00000030" in shown


def test_two_jobs_on_one_node_use_different_ports(cluster, new_job, undisturbed):
    jobs = [new_job() for _ in range(2)]
    for job in jobs:
        job.submit("--nodelist=n1", "--oversubscribe", overrides=LONG)
    for job in jobs:
        job.wait_for_step(1)
    assert all(cluster.job(job.id)["JobState"] == "RUNNING" for job in jobs)
    ports = set()
    for job in jobs:
        assert job.wait() == "COMPLETED", job.log
        assert curve(job.run) == curve(undisturbed)
        snapshot = json.loads((job.run.folder / f"slurm/{job.id}.0/job.json").read_text())
        assert snapshot["nodes"] == ["n1"]
        ports.add(int(snapshot["environment"]["MASTER_PORT"]))
    # Each job uses two ports, one for the preflight.
    assert max(ports) - min(ports) >= 2


def test_script_requests_its_gpus(cluster, new_job):
    job = new_job()
    output = f"--output={job.run.folder}.%j.log"
    script = str(SCRIPTS / "pretrain_moh.sh")
    wide = ["model.num_query_groups=8", "parallel.tensor=8"]
    job.ids.append(cluster.submit(output, script, *job.arguments(*wide), **ENVIRONMENT, MOH_DEVICE="cpu"))
    wait_for("the preflight", lambda: "1 nodes, 8 ranks are fit" in job.log, 200, lambda: job.log)
    assert cluster.job(job.id)["TresPerNode"] == "gres:gpu:8"


def test_node_with_too_few_gpus_is_refused(cluster, new_job):
    job = new_job()
    output = f"--output={job.run.folder}.%j.log"
    script = str(SCRIPTS / "pretrain_moh.sh")
    # No node has so many GPUs: sbatch refuses the job.
    refused = cluster.user("sbatch", "--gpus-per-node=9", script, *job.arguments())
    assert refused.returncode != 0
    assert "Requested node configuration is not available" in refused.stderr
    # Slurm is configured with GPUs that do not exist.
    flags = ("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", output)
    job.ids.append(cluster.submit(*flags, script, *job.arguments(), **ENVIRONMENT))
    assert job.wait() == "FAILED"
    assert "sees 0 GPUs, and 2 were asked for" in job.log.splitlines()[-1]
    assert job.events() == ["start", "refused"]


def test_node_without_the_data_is_named(cluster, new_job):
    job = new_job()
    machine = cluster.machines["n2"]
    run(*machine.inside("mount", "-t", "tmpfs", "none", str(job.run.data)))
    try:
        job.submit(*APART, MAX_RESTARTS="0")
        assert job.wait() == "FAILED"
    finally:
        run(*machine.inside("umount", str(job.run.data)))
    last = job.log.splitlines()[-1]
    assert "n2 cannot read the data: No prepared data" in last
    assert "n1" not in last


def test_corrupt_data_is_refused(new_job):
    job = new_job()
    damaged = job.run.folder.with_name("damaged")
    shutil.copytree(job.run.data, damaged)
    (damaged / "train.bin").write_bytes((damaged / "train.bin").read_bytes()[:-2])
    job.submit(overrides=(f"data.dir={damaged}",))
    assert job.wait() == "FAILED"
    assert "train.bin: expected" in job.log.splitlines()[-1]
    assert job.cluster.job(job.id)["Restarts"] == "0"
    assert job.events() == []


def test_run_folder_of_another_configuration_is_refused(cluster, new_job):
    job = new_job()
    job.submit()
    assert job.wait() == "COMPLETED", job.log
    flags = ("--gpus-per-node=0", "--ntasks-per-node=2")
    typed = cluster.user(str(SCRIPTS / "pretrain_moh.sh"), *flags, *job.arguments("run.seed=5"), **ENVIRONMENT)
    assert typed.returncode == 2
    assert "run.seed: expected 1234, got 5" in typed.stderr
    job.submit(overrides=("run.seed=5",))
    assert job.wait() == "FAILED"
    assert cluster.job(job.id)["Restarts"] == "0"
    assert job.events() == ["start", "finished"]
    assert any("run.seed: expected 1234, got 5" in line for line in job.log.splitlines()[-4:])
