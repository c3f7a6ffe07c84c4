"""The test cluster itself: it leaves nothing behind and changes nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]
BRING_UP = """
import sys, time
from pathlib import Path
from cluster import Cluster
with Cluster(Path(sys.argv[1])) as cluster:
    cluster.submit("--wrap", "sleep 600", "--output=/dev/null")
    time.sleep(1)
    print("up", flush=True)
    time.sleep(600)
"""


def processes_of(state: Path) -> list[str]:
    """Return the command lines of processes whose arguments or environment name the cluster in ``state``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            content = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(state).encode() in content and int(process.name) != os.getpid():
            found.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
    return found


def test_killed_cluster_leaves_nothing_behind(cluster, tmp_path):
    state = tmp_path / "other"
    command = [sys.executable, "-c", BRING_UP, str(state)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        # It runs beside the cluster of this session.
        assert len(processes_of(state)) > 5
        assert cluster.client("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split() == ["n1", "n2"]
        other.kill()
    wait_for("the end of all", lambda: not processes_of(state), 10)
    mounts = Path("/proc/mounts").read_text()
    assert str(state) not in mounts


def test_cluster_can_be_started_again(tmp_path):
    for name in ("first", "second"):
        with Cluster(tmp_path / name) as cluster:
            job = cluster.submit("--nodes=2", f"--output={tmp_path}/%j", "--wrap", "srun hostname")
            assert cluster.wait(job, 30)["JobState"] == "COMPLETED"
            assert sorted((tmp_path / str(job)).read_text().split()) == ["n1", "n2"]
    time.sleep(0.5)
    assert processes_of(tmp_path) == []


def test_crashed_node_loses_its_processes_and_can_be_booted(cluster):
    cluster.wait_until_idle()
    cluster.crash("n2")
    assert [line for line in processes_of(cluster.state) if "slurmd -N n2" in line] == []
    cluster.boot("n2")
    cluster.wait_until_idle()
