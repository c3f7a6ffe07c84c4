"""How a job reacts to the end of its ranks; a stand-in replaces the ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from jobs import CPU_NODES, SCRIPTS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(200)]
STAND_IN = Path(__file__).with_name("stand_in.sh")


class StandInJob:
    """A job whose ranks do what ``acts`` say."""

    def __init__(self, cluster: Cluster, folder: Path, acts: dict[str, str], *flags: str, **variables: str) -> None:
        self.cluster, self.run = cluster, folder / "run"
        self.acts = folder / "acts"
        self.acts.mkdir()
        for name, act in acts.items():
            (self.acts / name).write_text(act + "\n")
        self._log = folder / "log"
        common = {"RUN": str(self.run), "ACTS": str(self.acts), "RESTART_PAUSE": "0", "MOH_PYTHON": str(STAND_IN)}
        flags = ("--ntasks-per-node=2", *CPU_NODES, f"--output={self._log}", *flags)
        self.id = cluster.submit(*flags, str(SCRIPTS / "pretrain_moh.sh"), "CONFIG", **(common | variables))

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def history(self) -> list[list[str]]:
        path = self.run / "slurm/history.tsv"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def events(self) -> list[str]:
        return [line[3] for line in self.history]

    def trains(self, ranks: int = 2) -> None:
        """Wait until all ranks of the first start handle signals."""
        path = self.run / "trains"
        wait_for("ranks", lambda: path.exists() and path.read_text().count("0\n") == ranks, 60, lambda: self.log)

    def state(self) -> str:
        return self.cluster.wait(self.id, 120)["JobState"]


@pytest.fixture
def job_with(cluster: Cluster, tmp_path: Path) -> Callable[..., StandInJob]:
    cluster.wait_until_idle()
    return lambda acts, *flags, **variables: StandInJob(cluster, tmp_path, acts, *flags, **variables)


def test_job_finishes(job_with):
    job = job_with({"pretrain.py.0": "train 0"})
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "finished"]


def test_job_saves_before_the_time_limit_and_resumes(job_with):
    job = job_with({"pretrain.py.0": "train 60", "pretrain.py.1": "train 0"})
    job.trains()
    # The effect of --signal, without its delay.
    job.cluster.client("scancel", "--signal=USR1", str(job.id))
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "saved", "start", "finished"]
    assert job.history[1][4:6] == ["75", "7"]


def test_signal_before_the_ranks_are_up_restarts_the_job(job_with):
    job = job_with({"preflight.py.0": "kill -USR1 $$", "pretrain.py.1": "kill -USR1 $$"})
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "saved", "start", "saved", "start", "finished"]


@pytest.mark.parametrize("what", ["requeue", "cancel"])
def test_requeue_or_cancellation_by_the_user_is_respected(job_with, what):
    job = job_with({"pretrain.py.0": "train 60"})
    job.trains()
    if what == "requeue":
        job.cluster.client("scontrol", "requeue", str(job.id))
        assert job.state() == "COMPLETED", job.log
        assert job.events == ["start", "stopped", "start", "finished"]
    else:
        job.cluster.client("scancel", str(job.id))
        assert job.state() == "CANCELLED", job.log
        wait_for("the end", lambda: job.events == ["start", "stopped"], 30)
    # The job has waited for the save, although Slurm signalled all its shells.
    assert [job.history[1][column] for column in (4, 7)] == ["75", "received SIGTERM: saved"]


def test_preempted_job_waits_and_resumes(job_with):
    job = job_with({"pretrain.py.0": "train 60"}, "--nodes=2", "--partition=low")
    job.trains(4)
    other = job.cluster.submit("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert job.state() == "COMPLETED", job.log
    assert job.cluster.job(other)["JobState"] == "COMPLETED"
    assert job.events == ["start", "saved", "start", "finished"]


def test_user_error_is_not_repeated(job_with):
    job = job_with({"pretrain.py.0": "ended 2 'moh.active_heads must be 3' null"})
    assert job.state() == "FAILED"
    assert job.events == ["start", "refused"]
    assert job.log.splitlines()[-1] == "error: moh.active_heads must be 3"


def test_same_failure_at_the_same_step_ends_the_job(job_with):
    acts = {f"pretrain.py.{restart}": "ended 1 'rank 1 (n7, after step 9, train) burns' 9" for restart in range(3)}
    acts["pretrain.py.0"] = "ended 1 'rank 1 (n3, after step 9, train) burns' 9"
    job = job_with(acts)
    assert job.state() == "FAILED"
    assert job.events == ["start", "fault"] * 2
    assert job.log.splitlines()[-1].startswith("error: the run failed twice in the same way at step 9")


def test_stand_in_job_ends_after_max_restarts(job_with):
    job = job_with({f"pretrain.py.{restart}": f"ended 1 burns {restart}" for restart in range(5)}, MAX_RESTARTS="2")
    assert job.state() == "FAILED"
    assert job.events == ["start", "fault"] * 3
    assert "MAX_RESTARTS=2" in job.log.splitlines()[-1]


def test_fault_counts_more_than_a_save_of_another_rank(job_with):
    disagree = 'if [ "$SLURM_PROCID" = 0 ]; then ended 1 "a disk is full" 4; else exit 75; fi'
    job = job_with({"pretrain.py.0": disagree, "pretrain.py.1": "train 0"})
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "fault", "start", "finished"]


def test_node_that_fails_twice_is_avoided(job_with):
    missing = 'ended 1 "rank 1 ($SLURMD_NODENAME, after step {0}, train) is missing" {0}'
    kill = '[ "$SLURM_PROCID" != 1 ] || kill -9 $$; sleep 1; ' + missing
    job = job_with({f"pretrain.py.{restart}": kill.format(restart) for restart in range(2)}, "--nodes=1")
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "fault", "start", "fault", "start", "finished"]
    starts = [line[6] for line in job.history if line[3] == "start"]
    assert starts[0] == starts[1] != starts[2]
    assert job.cluster.job(job.id)["ExcNodeList"] == starts[0]


def test_node_named_by_the_preflight_is_recorded(job_with):
    fails = '[ "$SLURM_PROCID" != 0 ] || printf "%s\\tsmells of fire\\n" "$SLURMD_NODENAME" >"${@: -1}"; exit 1'
    job = job_with({f"preflight.py.{restart}": fails for restart in range(2)}, "--nodes=1")
    assert job.state() == "COMPLETED", job.log
    assert job.events == ["start", "fault", "start", "fault", "start", "finished"]
    nodes = [line[6] for line in job.history if line[3] == "fault"]
    assert job.history[-2][6] not in nodes
    assert "smells of fire" in job.history[1][7]


def test_job_resumes_after_a_node_crash(job_with, cluster):
    job = job_with({"pretrain.py.0": "train 60"}, "--nodes=1")
    job.trains()
    (node,) = [line[6] for line in job.history]
    cluster.crash(node)
    try:
        assert job.state() == "COMPLETED", job.log
    finally:
        cluster.boot(node)
    assert job.events == ["start", "lost", "start", "finished"]
    assert job.history[1][6] == node


def test_stand_in_job_of_one_or_two_nodes_resumes_on_one(job_with, cluster):
    job = job_with({"pretrain.py.0": "train 60"}, "--nodes=1-2")
    job.trains(4)
    cluster.crash("n2")
    try:
        assert job.state() == "COMPLETED", job.log
    finally:
        cluster.boot("n2")
    assert [line[6] for line in job.history if line[3] == "start"] == ["n1,n2", "n1"]


def test_second_job_of_a_run_folder_is_refused(job_with, cluster, tmp_path):
    job = job_with({"pretrain.py.0": "train 5"})
    job.trains()
    second = tmp_path / "second"
    second.mkdir()
    other = StandInJob(cluster, second, {}, RUN=str(job.run))
    assert other.state() == "FAILED"
    assert other.log.splitlines()[-1].startswith(f"error: {job.run}: job {job.id} trains in this folder")
    assert job.state() == "COMPLETED"


def test_job_waits_for_the_lock(job_with, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    with subprocess.Popen(["flock", str(run / ".lock"), "sleep", "4"]) as holder:
        job = job_with({"pretrain.py.0": "train 0"})
        assert job.state() == "COMPLETED", job.log
        assert holder.poll() is not None


def test_interface_is_the_one_that_reaches_the_first_node(job_with):
    write = 'echo "$SLURMD_NODENAME $GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME $MASTER_ADDR" >>"$RUN/interfaces"; exit 0'
    # On a busy machine the tasks of the first start may fail; the second start then succeeds.
    job = job_with({f"pretrain.py.{restart}": write for restart in range(2)}, "--nodes=2")
    assert job.state() == "COMPLETED", job.log
    interfaces = sorted((job.run / "interfaces").read_text().splitlines())
    assert interfaces == [f"{node} eth0 =eth0 n1" for node in ("n1", "n1", "n2", "n2")]
