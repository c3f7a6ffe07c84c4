"""sbatch slurm/prepare_data.sh: an array on two nodes makes the same files as one process."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, wait_for
from jobs import ENVIRONMENT, SCRIPTS
from support.runs import SMALL, command, finish

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
TASKS = 4


@pytest.fixture(scope="module")
def corpus(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (configuration with one file a task and a given tokenizer, dataset that one process made)."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    words = ["kalo", "miter", "suve", "pinda"]
    for number in range(TASKS):
        # Each file is larger than the smallest part, 4 MB.
        lines = (" ".join(draw.choices(words, k=4000)) for _ in range(200))
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"text{number}.jsonl").write_text(text, encoding="utf-8")
    values: dict[str, Any] = {**SMALL, "run": {"dir": str(folder / "run")}}
    values["tokenizer"] = {"path": str(prepared[1] / "tokenizer")}
    values["data"] = {"inputs": [str(folder / "*.jsonl")], "validation_fraction": 0.1}
    config = folder / "corpus.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = finish(command("prepare_data.py", config, f"data.dir={folder / 'single'}"))
    assert done.returncode == 0, done.stderr
    return config, folder / "single"


def files_of(dataset: Path) -> dict[str, Any]:
    """Return the content of every file, and of the manifest all values that do not depend on the command."""
    found: dict[str, Any] = {
        str(file.relative_to(dataset)): file.read_bytes() for file in dataset.rglob("*") if file.is_file()
    }
    manifest = json.loads(found.pop("manifest.json"))
    return found | {name: value for name, value in manifest.items() if name not in ("command", "versions")}


@pytest.fixture
def array(cluster: Cluster, corpus: tuple[Path, Path], tmp_path: Path) -> Callable[[], int]:
    """Return a function that submits the array and returns its id."""

    def submit() -> int:
        return cluster.submit(
            *(f"--array=1-{TASKS}%3", "--cpus-per-task=1", "--distribution=cyclic", f"--output={tmp_path}/%A_%a.log"),
            *(str(SCRIPTS / "prepare_data.sh"), str(corpus[0]), f"data.dir={tmp_path / 'data'}"),
            **ENVIRONMENT,
        )

    return submit


def logs(folder: Path) -> str:
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("*.[lo]*")))


def wait_for_merge(cluster: Cluster, array: int, folder: Path) -> None:
    def ended() -> bool:
        jobs = cluster.client("scontrol", "show", "job", "-o").splitlines()
        states = [line.split("JobState=")[1].split()[0] for line in jobs if f"merge-{array} " in line]
        assert not set(states) & {"FAILED", "CANCELLED"}, logs(folder)
        return states == ["COMPLETED"]

    wait_for(f"the merge after {array}", ended, 200, lambda: logs(folder))


def test_array_makes_the_dataset_of_one_process(cluster, corpus, array, tmp_path):
    wait_for_merge(cluster, array(), tmp_path)
    assert files_of(tmp_path / "data") == files_of(corpus[1])


@pytest.mark.slow
def test_killed_task_changes_nothing_in_the_dataset(cluster, corpus, array, tmp_path):
    job = array()
    # The process of the second task.
    argument = f"data.shard=2/{TASKS}".encode()

    def killed() -> bool:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argument in words and words[1].endswith(b"prepare_data.py"):
                os.kill(int(process.name), signal.SIGKILL)
                return True
        return False

    wait_for("task 2", killed, 60)
    wait_for_merge(cluster, job, tmp_path)
    assert cluster.job(f"{job}_2")["Restarts"] == "1"
    assert files_of(tmp_path / "data") == files_of(corpus[1])


def test_gap_in_the_array_is_refused(cluster, corpus, tmp_path):
    log = tmp_path / "log"
    job = cluster.submit(
        *("--array=2-3", "--cpus-per-task=1", f"--output={log}", str(SCRIPTS / "prepare_data.sh"), str(corpus[0])),
        **ENVIRONMENT,
    )
    assert cluster.wait(job, 60)["JobState"] == "FAILED"
    assert "count from 1" in log.read_text()
