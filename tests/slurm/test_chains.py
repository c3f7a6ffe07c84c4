"""Jobs of one process, and jobs that submit the next one; a stand-in replaces Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from jobs import CPU_NODES, SCRIPTS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(120)]
STAND_IN = Path(__file__).with_name("stand_in.sh")
RECORD_CALL = 'echo "$(basename "$1") ${*:2}" >>"$RUN/called"'


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Callable[..., int]:
    """Return a function that submits a script whose Python records its call and does what ``acts`` say."""
    (tmp_path / "acts").mkdir()
    (tmp_path / "run").mkdir()

    def submit(script: str, acts: dict[str, str], *arguments: str, flags: tuple[str, ...] = ()) -> int:
        for name, act in acts.items():
            (tmp_path / "acts" / name).write_text(f"{RECORD_CALL}\n{act}\n")
        variables = {"RUN": str(tmp_path / "run"), "ACTS": str(tmp_path / "acts"), "RESTART_PAUSE": "0"}
        return cluster.submit(
            *("--cpus-per-task=1", f"--output={tmp_path}/log", *flags, str(SCRIPTS / script), *arguments),
            **variables,
            MOH_PYTHON=str(STAND_IN),
        )

    return submit


def called(folder: Path) -> list[str]:
    return (folder / "run/called").read_text().splitlines()


def test_conversion_gets_its_arguments(cluster, start, tmp_path):
    job = start("convert.sh", {"convert.py.0": "exit 0"}, "megatron-to-hf", "--load-dir", "a b", "--hf-dir", "c")
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"
    assert called(tmp_path) == ["convert.py megatron-to-hf --load-dir a b --hf-dir c"]


def test_killed_evaluation_is_repeated(cluster, start, tmp_path):
    acts = {"evaluate.py.0": "kill -9 $$", "evaluate.py.1": "exit 0"}
    job = start("evaluate.sh", acts, "runs/one", flags=("--gpus-per-node=0",))
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"
    assert called(tmp_path) == ["evaluate.py runs/one"] * 2


def test_user_error_of_one_process_is_not_repeated(cluster, start, tmp_path):
    job = start("convert.sh", {"convert.py.0": "echo 'error: no such folder' >&2; exit 2"}, "megatron-to-hf")
    assert cluster.wait(job, 60)["JobState"] == "FAILED"
    assert called(tmp_path) == ["convert.py megatron-to-hf"]
    assert (tmp_path / "log").read_text().splitlines()[-1] == "error: no such folder"


def test_stage_2_follows_stage_1(cluster, start, tmp_path):
    note = '[ "$SLURM_PROCID" = 0 ] || exit 0; '
    acts = {"continue_tune.py.0": note + "ended 0 finished 30", "preflight.py.0": "exit 0"}
    flags = ("--nodes=2", "--ntasks-per-node=2", *CPU_NODES)
    job = start("continue_tune_llama3_8b.sh", acts, "ONE", "a.b=1", "--", "TWO", "c.d=2", flags=flags)
    assert cluster.wait(job, 60)["JobState"] == "COMPLETED"

    def second() -> str:
        jobs = cluster.client("scontrol", "show", "job", "-o").splitlines()
        (state,) = (line.split("JobState=")[1].split()[0] for line in jobs if f"-stage2-{job} " in line)
        return state

    wait_for("stage 2", lambda: second() == "COMPLETED", 60)
    trained = [line for line in called(tmp_path) if line.startswith("continue_tune.py")]
    assert sorted(set(trained)) == [
        "continue_tune.py ONE a.b=1",
        "continue_tune.py ONE a.b=1 --prepare",
        "continue_tune.py TWO c.d=2",
        "continue_tune.py TWO c.d=2 --prepare",
    ]
    assert trained.count("continue_tune.py TWO c.d=2") == 4
    assert trained.index("continue_tune.py ONE a.b=1 --prepare") == 0
