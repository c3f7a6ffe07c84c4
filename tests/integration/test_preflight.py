"""slurm/preflight.py with ranks that this test starts: messages carry the name of the node."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ENVIRONMENT, REPOSITORY


def start(rank: int, port: int, prepared: tuple[Path, Path], report: Path, **variables: str) -> subprocess.Popen[str]:
    """Start one of four ranks on two nodes, which are named left and right."""
    own = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "4", "SLURM_LOCALID": str(rank % 2), "SLURM_STEP_ID": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "MOH_NODES": "left right", "MOH_FREE_GIB": "0"}
    config, data = prepared
    arguments = [str(config), f"data.dir={data}", f"run.dir={report.parent / 'run'}", "--report", str(report)]
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "slurm/preflight.py"), *arguments],
        env=ENVIRONMENT | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | own | meeting | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_missing_rank_and_full_disk_are_reported(prepared, tmp_path):
    report, port = tmp_path / "report.tsv", free_port()
    of_rank = {0: {"MOH_FREE_GIB": "1e9"}}
    common = {"MOH_MEETING_SECONDS": "40"}
    ranks = [start(rank, port, prepared, report, **common, **of_rank.get(rank, {})) for rank in (0, 1, 2)]
    outputs = [rank.communicate(timeout=150) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1, 1], outputs
    absent, full = report.read_text(encoding="utf-8").splitlines()
    assert absent == "right\trank 3 did not come to the meeting in 40 s"
    assert full.startswith("left\t")
    assert "GiB are free in run.dir" in full
    messages = outputs[0][1].splitlines()
    assert messages[-2] == "error: preflight: node right: rank 3 did not come to the meeting in 40 s"
    assert messages[-1].startswith("error: preflight: node left: ")


def test_same_problem_on_all_nodes_is_a_user_error(prepared, tmp_path):
    report, port = tmp_path / "report.tsv", free_port()
    ranks = [start(rank, port, prepared, report, MOH_GPUS="1000") for rank in range(4)]
    outputs = [rank.communicate(timeout=150) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2] * 4, outputs
    assert [line.partition("\t")[0] for line in report.read_text().splitlines()] == ["left", "right"]
    assert "1000 were asked for" in outputs[0][1].splitlines()[-1]
