"""Runs that fail or are stopped, without a launcher: how they end, what they report, and what they leave."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import ENVIRONMENT, Run

from moh_megatron.checkpoint.layout import problem_with
from moh_megatron.config.load import load_config
from moh_megatron.data.dataset import build_train_dataset
from moh_megatron.data.prepared_data import load_prepared

WORKER = Path(__file__).parent / "workers" / "faults.py"
NAMESPACE = ("unshare", "-r", "-m")
DISKS = ("full", "full_log", "read_only")
DEADLINE_SECONDS = 20
LARGEST_GROWTH_KIB = 8 * 1024


class Result:
    """The result of one case."""

    def __init__(self, folder: Path, name: str) -> None:
        kept = folder / f"{name}_kept"
        self.run = (kept if kept.exists() else folder / name) / "run"
        found = json.loads((folder / "results.json").read_text())[name]
        self.codes, self.seconds = found["codes"], found["seconds"]
        self.logs = [(folder / f"{name}_{rank}.log").read_text() for rank in range(2)]

    def records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run / name).read_text().splitlines()]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run / "checkpoints").glob("step_*"))

    def exit_json(self) -> dict[str, Any]:
        return json.loads((self.run / "exit.json").read_text())


Cases = Callable[[str], Result]


def run_cases(prepared: tuple[Path, Path], folder: Path, *names: str, within: tuple[str, ...] = ()) -> Cases:
    command = [*within, sys.executable, str(WORKER), *map(str, prepared), str(folder), *names]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name: Result(folder, name)


@pytest.fixture(scope="module")
def cases(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """One case of each kind."""
    return run_cases(prepared, tmp_path_factory.mktemp("faults"), "over_time", "nan", "another_seed", "data_vanished")


@pytest.fixture(scope="module")
def mounts() -> bool:
    """Return whether a process may mount disks in a namespace of its own."""
    attempt = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def more_cases(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, mounts: bool) -> Cases:
    names = [
        "nan_again_and_again",
        "spike_skipped",
        "spike_reported",
        "signalled",
        "signalled_twice",
        "own_folder",
        "another_weight",
        "data_shortened",
        "killed",
        "stopped",
        "run_deleted",
        "run_folder_in_use",
    ]
    names += DISKS if mounts else []
    return run_cases(prepared, tmp_path_factory.mktemp("faults"), *names, within=NAMESPACE if mounts else ())


def test_time_limit_of_one_rank_stops_and_saves_all_ranks(cases: Cases) -> None:
    found = cases("over_time")
    assert found.codes == [75, 75]
    assert found.exit_json()["code"] == 75
    assert found.checkpoints()[-1] == f"step_{found.exit_json()['step']:08d}"


def test_timeouts_of_process_groups_follow_the_configuration(cases: Cases) -> None:
    """They are 15 s longer than those of the watchdog, which waits half an hour for the start-up."""
    found = cases("over_time")
    step_groups = dict.fromkeys(("tensor parallelism", "data parallelism", "control"), 77 + 15)
    for rank in range(2):
        assert json.loads((found.run.parent / f"timeouts_{rank}.json").read_text()) == {
            "all ranks": 1815,
            **step_groups,
        }


def test_bad_step_is_skipped_counted_and_reported_with_its_documents(cases: Cases) -> None:
    found = cases("nan")
    assert found.codes == [0, 0]
    skipped = [record["step"] for record in found.records("metrics.jsonl") if record["skipped"]]
    assert skipped == [5, 6]
    assert [record["lm_loss"] for record in found.records("metrics.jsonl")[4:6]] == [None, None]
    assert json.loads((found.run / "summary.json").read_text())["skipped_steps"] == 2
    reported = found.records("skipped.jsonl")
    assert [record["reason"] for record in reported] == ["the loss is not finite on rank 1"] * 2
    # Rank 1 of two reads the second half of the global batch of 8.
    assert [list(record["samples"]) for record in reported] == [["36", "37", "38", "39"], ["44", "45", "46", "47"]]
    config = load_config(str(found.run / "config.yaml"), [])
    data = load_prepared(config)
    dataset = build_train_dataset(config, data, data.tokenizer())
    documents = dataset.documents(36)
    assert [part["document"] for part in reported[0]["samples"]["36"]] == [part.document for part in documents]
    assert f"sample 36: document {documents[0].document} from token {documents[0].token}" in found.logs[0]


def test_profile_is_written(cases: Cases) -> None:
    (trace,) = (cases("nan").run / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") for event in events) == 3


def test_seconds_of_the_start_up_are_reported_by_part(cases: Cases) -> None:
    found = cases("nan")
    parts = json.loads((found.run / "summary.json").read_text())["startup_seconds"]
    assert list(parts) == ["imports", "groups", "data", "model and engine", "first step"]
    assert "from launch to the end of the first step: imports" in found.logs[0]


def test_ranks_that_disagree_are_refused_before_the_first_step(cases: Cases) -> None:
    found = cases("another_seed")
    assert found.codes == [2, 2]
    first, second = found.logs
    assert "the ranks do not agree on the configuration" in first
    assert "run.seed: 1234 on rank 0; 1235 on rank 1" in first
    assert "error: " not in second, "the error of all ranks is reported once"
    assert not (found.run / "metrics.jsonl").exists()


def test_deleted_data_file_ends_the_run(cases: Cases) -> None:
    found = cases("data_vanished")
    assert found.codes == [1, 1]
    assert all("data/train.bin: the data can no longer be read: No such file" in log for log in found.logs)
    assert all("Traceback" not in log for log in found.logs)
    assert found.checkpoints() == ["step_00000010"]


@pytest.mark.slow
def test_truncated_data_file_ends_the_run(more_cases: Cases) -> None:
    """A rank that is reading gets a bus error, which cannot be caught; the other rank ends as well."""
    found = more_cases("data_shortened")
    assert set(found.codes) <= {1, -signal.SIGBUS}
    message = "data/train.bin: the data has changed: 100 bytes, expected"
    for code, log in zip(found.codes, found.logs, strict=True):
        assert code == -signal.SIGBUS or message in log or "is missing" in log or "is gone" in log
    assert found.seconds < 60
    assert found.checkpoints() == ["step_00000010"]


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run(more_cases: Cases) -> None:
    found = more_cases("nan_again_and_again")
    assert found.codes == [1, 1]
    good = f"Last good checkpoint: {found.run}/checkpoints/step_00000010"
    assert all(good in log and "4 steps in a row were skipped" in log for log in found.logs)
    assert found.exit_json()["code"] == 1


@pytest.mark.slow
def test_spike_is_skipped_or_only_reported(more_cases: Cases) -> None:
    skipped, reported = more_cases("spike_skipped"), more_cases("spike_reported")
    assert skipped.codes == reported.codes == [0, 0]
    assert [record["step"] for record in skipped.records("metrics.jsonl") if record["skipped"]] == [15]
    assert "step 15 is skipped" in skipped.logs[0]
    assert "its loss is a spike" in skipped.logs[0]
    assert not any(record["skipped"] for record in reported.records("metrics.jsonl"))
    assert "is a spike" in reported.logs[0]
    assert "samples 112 to 119 of" in reported.logs[0]
    both = (found.records("metrics.jsonl")[:14] for found in (skipped, reported))
    assert len({tuple(record["loss"] for record in records) for records in both}) == 1


@pytest.mark.slow
def test_signal_to_rank_1_stops_and_saves_all_ranks(more_cases: Cases) -> None:
    found = more_cases("signalled")
    assert found.codes == [75, 75]
    assert found.exit_json() == {
        "code": 75,
        "reason": "a signal to another rank: saved",
        "step": found.exit_json()["step"],
    }
    assert found.checkpoints()[-1] == f"step_{found.exit_json()['step']:08d}"
    assert problem_with(found.run / "checkpoints" / found.checkpoints()[-1]) is None


@pytest.mark.slow
def test_second_signal_during_a_save_ends_at_once_and_loses_nothing(more_cases: Cases, uninterrupted: Run) -> None:
    found = more_cases("signalled_twice")
    folder = found.run.parent
    assert found.codes == [128 + signal.SIGUSR1] * 2
    assert float((folder / "ended").read_text()) - float((folder / "signalled").read_text()) < 2
    partial, *complete = json.loads((folder / "left.json").read_text())
    assert partial.startswith(".partial_step_")
    assert complete == ["latest", "step_00000010"]
    assert json.loads((folder / "another.json").read_text()) == [0, 0]
    assert "resumed after step 10" in folder.with_name("signalled_twice_another_0.log").read_text()
    keys = ("step", "loss", "grad_norm")
    curves = (found.records("metrics.jsonl"), uninterrupted.records())
    resumed, expected = ([[record[key] for key in keys] for record in curve] for curve in curves)
    assert resumed == expected


@pytest.mark.slow
def test_run_folder_that_not_all_nodes_share_is_refused(more_cases: Cases) -> None:
    found = more_cases("own_folder")
    assert found.codes == [2, 2]
    first, second = found.logs
    assert "what rank 0 wrote to run: seen on rank 0; not seen on rank 1" in first
    assert "run.dir must be on a disk that all nodes share" in first
    assert "error: " not in second, "the error of all ranks is reported once"
    assert [path.name for path in (found.run.parent / "node0" / "run").glob(".seen*")] == []


@pytest.mark.slow
def test_weights_that_differ_between_replicas_are_refused(more_cases: Cases) -> None:
    found = more_cases("another_weight")
    assert found.codes == [2, 2]
    first, second = found.logs
    assert "the ranks do not agree on the weights of tensor-parallel rank 0" in first
    assert "decoder.layers.1.mlp.linear_fc1.weight: " in first
    assert "linear_fc2" not in first
    assert "error: " not in second, "the error of all ranks is reported once"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "codes", "missing"), [("killed", [1, -9], 1), ("stopped", [None, 1], 0)])
def test_lost_rank_is_named_in_time(more_cases: Cases, case: str, codes: list[int | None], missing: int) -> None:
    found = more_cases(case)
    assert found.codes == codes
    assert found.seconds < DEADLINE_SECONDS
    assert f"rank {missing} " in found.exit_json()["reason"]
    assert found.exit_json()["reason"] in found.logs[1 - missing]


@pytest.mark.slow
def test_second_job_on_a_run_folder_is_refused(more_cases: Cases) -> None:
    found = more_cases("run_folder_in_use")
    assert found.codes == [75, 75]
    assert found.exit_json()["code"] == 75
    folder = found.run.parent
    assert json.loads((folder / "another.json").read_text()) == [2, 2]
    for rank in range(2):
        log = folder.with_name(f"run_folder_in_use_another_{rank}.log").read_text()
        assert f"{found.run}: process " in log
        assert "trains in this folder" in log


@pytest.mark.slow
def test_deleted_run_folder_ends_the_run(more_cases: Cases) -> None:
    found = more_cases("run_deleted")
    assert found.codes == [1, 1]
    for log in found.logs:
        assert str(found.run) in log
        assert "deleted, moved or replaced" in log
        assert "Traceback" not in log
    assert not found.run.exists(), "a folder that was moved away is not made again to hold exit.json"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "path"), [("full", "run/"), ("full_log", "run/"), ("read_only", "run/checkpoints")])
def test_disk_that_cannot_be_written_ends_the_run(more_cases: Cases, mounts: bool, case: str, path: str) -> None:
    if not mounts:
        pytest.skip("this system does not allow mounts in a namespace")
    found = more_cases(case)
    assert found.codes == [1, 1]
    for log in found.logs:
        assert path in log
        assert "Traceback" not in log
        assert "Read-only file system" in log if case == "read_only" else "No space left on device" in log
    if case != "full_log":
        assert found.checkpoints()[0] == "step_00000010"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_grow_over_2000_steps(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """The run has validations, checkpoints and retention."""
    found = run_cases(prepared, tmp_path, "long")("long")
    assert found.codes == [0, 0]
    for rank in range(2):
        memory = json.loads((tmp_path / "long" / f"memory_{rank}.json").read_text())
        assert memory["2000"] - memory["500"] < LARGEST_GROWTH_KIB, memory
