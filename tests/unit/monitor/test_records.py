"""Records over several restarts of a run, and files that are written atomically."""

import json
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.io.errors import Fault
from moh_megatron.monitor import records as records_module
from moh_megatron.monitor.records import StepRecords, end_records, last_step, naming, read_records, write_exit


def record(step, start=1):
    return {"step": step, "loss": step / 8, "start": start}


def train(path, first, last, start=1):
    """The steps of a run after one of its starts: first + 1 to last."""
    records = StepRecords(path, first)
    records.write(record(step, start) for step in range(first + 1, last + 1))
    records.close()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_file_gets_one_line_per_step(tmp_path):
    train(tmp_path / "metrics.jsonl", 0, 3)
    assert read(tmp_path / "metrics.jsonl") == [record(1), record(2), record(3)]


def test_lines_can_be_read_before_the_file_is_closed(tmp_path):
    records = StepRecords(tmp_path / "metrics.jsonl", 0)
    records.write([record(1)])
    assert read(tmp_path / "metrics.jsonl") == [record(1)]
    records.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_records_after_the_start_step_are_cut_off(tmp_path, start):
    path = tmp_path / "metrics.jsonl"
    train(path, 0, 5)
    train(path, start, 6, start=2)
    assert read(path) == [record(step) for step in range(1, start + 1)] + [record(s, 2) for s in range(start + 1, 7)]


@given(cut=st.integers(0, 200), start=st.integers(0, 5))
def test_a_file_truncated_anywhere_keeps_complete_lines_only(tmp_path_factory, cut, start):
    path = tmp_path_factory.mktemp("truncated") / "metrics.jsonl"
    train(path, 0, 5)
    left = path.read_bytes()[:cut]
    path.write_bytes(left)
    kept = min(left.count(b"\n"), start)
    assert last_step(path) == (left.count(b"\n") or None)
    train(path, start, 6, start=2)
    assert read(path) == [record(step) for step in range(1, kept + 1)] + [record(s, 2) for s in range(start + 1, 7)]


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"\xff\xfe\n", b'{"step": 4, "los\n'])
def test_a_damaged_line_is_dropped_with_all_lines_behind_it(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    train(path, 0, 3)
    path.write_bytes(path.read_bytes() + garbage + b'{"step": 5}\n')
    assert last_step(path) == 3
    train(path, 3, 4, start=2)
    assert read(path) == [record(1), record(2), record(3), record(4, 2)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_any_history_of_restarts_ends_with_one_line_per_step_in_order(tmp_path_factory, restarts):
    path = tmp_path_factory.mktemp("restarts") / "metrics.jsonl"
    reached = 0
    for start, (back, further) in enumerate(restarts):
        first = max(0, reached - back)
        train(path, first, first + further, start)
        reached = first + further
    train(path, min(reached, 30), 30, start=99)
    assert [line["step"] for line in read(path)] == list(range(1, 31))


def test_restarting_leaves_no_other_file(tmp_path):
    train(tmp_path / "metrics.jsonl", 0, 3)
    train(tmp_path / "metrics.jsonl", 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_last_step_of_nothing_is_none(tmp_path):
    assert last_step(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").touch()
    assert last_step(tmp_path / "metrics.jsonl") is None


@pytest.mark.parametrize("step", [7, None])
def test_exit_json_holds_code_reason_and_step(tmp_path, step):
    (tmp_path / "run").mkdir()
    write_exit(tmp_path / "run", 75, "received SIGUSR1: saved", step)
    content = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert content == {"code": 75, "reason": "received SIGUSR1: saved", "step": step}


def test_exit_json_holds_no_control_characters_of_a_reason(tmp_path):
    write_exit(tmp_path, 1, "rank 1 ended: \x1b[2J", 3)
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == r"rank 1 ended: \x1b[2J"


def test_write_exit_ignores_errors_of_the_disk(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    write_exit(tmp_path / "run", 1, "the real reason", None)
    assert (tmp_path / "run").read_text() == "a file where the folder should be"


def test_a_run_folder_that_was_moved_away_is_not_made_again(tmp_path):
    write_exit(tmp_path / "run", 1, "the launcher is gone", 7)
    assert list(tmp_path.iterdir()) == []


def test_no_record_follows_the_step_that_exit_json_names(tmp_path, monkeypatch):
    """The watchdog ends the process while the main thread trains on: here the roles of the two threads are swapped."""
    monkeypatch.setattr(records_module, "_WRITING", threading.RLock())
    records = StepRecords(tmp_path / "metrics.jsonl", 0)
    records.write([record(1)])
    end_records()
    training = threading.Thread(target=records.write, args=([record(2)],), daemon=True)
    training.start()
    training.join(0.2)
    assert training.is_alive()
    assert last_step(tmp_path / "metrics.jsonl") == 1
    records_module._WRITING.release()
    training.join()
    assert last_step(tmp_path / "metrics.jsonl") == 2
    records.close()


def test_nan_and_infinity_become_null(tmp_path):
    records = StepRecords(tmp_path / "metrics.jsonl", 0)
    records.write([{"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "sources": {"a": math.nan}}])
    records.close()
    read_back = {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "sources": {"a": None}}
    assert read_records(tmp_path / "metrics.jsonl") == [read_back]
    assert read_records(tmp_path / "nothing.jsonl") == []


def test_an_error_of_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"), naming(str(tmp_path / "full")):
        (tmp_path / "full").write_text("x")


@pytest.mark.parametrize("moved", [False, True])
def test_writing_to_a_deleted_or_moved_file_is_a_fault(tmp_path, moved):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    records = StepRecords(path, 0)
    records.write([{"step": 1}])
    path.parent.rename(tmp_path / "moved") if moved else path.unlink()
    with pytest.raises(Fault, match=rf"^{path} was deleted, moved or replaced while the run wrote to it\."):
        records.write([{"step": 2}])
