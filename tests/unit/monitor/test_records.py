"""metrics.jsonl over several lives of a run, and files written whole or not at all."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moh_megatron.io.errors import Fault
from moh_megatron.monitor.records import StepRecords, last_step, naming, read_records, write_exit


def record(step, life=1):
    return {"step": step, "loss": step / 8, "life": life}


def live(path, start, end, life=1):
    """One life of a run: steps start + 1 to end."""
    records = StepRecords(path, start)
    records.write(record(step, life) for step in range(start + 1, end + 1))
    records.close()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_file_gets_one_line_a_step(tmp_path):
    live(tmp_path / "metrics.jsonl", 0, 3)
    assert read(tmp_path / "metrics.jsonl") == [record(1), record(2), record(3)]


def test_lines_can_be_read_before_the_file_is_closed(tmp_path):
    records = StepRecords(tmp_path / "metrics.jsonl", 0)
    records.write([record(1)])
    assert read(tmp_path / "metrics.jsonl") == [record(1)]
    records.close()


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_what_lies_after_the_start_is_cut(tmp_path, start):
    path = tmp_path / "metrics.jsonl"
    live(path, 0, 5)
    live(path, start, 6, life=2)
    assert read(path) == [record(step) for step in range(1, start + 1)] + [record(s, 2) for s in range(start + 1, 7)]


@given(cut=st.integers(0, 200), start=st.integers(0, 5))
def test_a_file_torn_anywhere_keeps_whole_lines_only(tmp_path_factory, cut, start):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    live(path, 0, 5)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    survived = min(whole[:cut].count(b"\n"), start)
    assert last_step(path) == (whole[:cut].count(b"\n") or None)
    live(path, start, 6, life=2)
    assert read(path) == [record(step) for step in range(1, survived + 1)] + [record(s, 2) for s in range(start + 1, 7)]


@pytest.mark.parametrize("garbage", [b"\0" * 40, b"\xff\xfe\n", b'{"step": 4, "los\n'])
def test_what_a_crash_left_is_dropped_with_all_behind_it(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    live(path, 0, 3)
    path.write_bytes(path.read_bytes() + garbage + b'{"step": 5}\n')
    assert last_step(path) == 3
    live(path, 3, 4, life=2)
    assert read(path) == [record(1), record(2), record(3), record(4, 2)]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_any_history_of_restarts_ends_with_one_line_a_step_in_order(tmp_path_factory, lives):
    path = tmp_path_factory.mktemp("lives") / "metrics.jsonl"
    reached = 0
    for life, (back, further) in enumerate(lives):
        start = max(0, reached - back)
        live(path, start, start + further, life)
        reached = start + further
    live(path, min(reached, 30), 30, life=99)
    assert [line["step"] for line in read(path)] == list(range(1, 31))


def test_restarting_leaves_no_other_file(tmp_path):
    live(tmp_path / "metrics.jsonl", 0, 3)
    live(tmp_path / "metrics.jsonl", 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_last_step_of_nothing_is_none(tmp_path):
    assert last_step(tmp_path / "metrics.jsonl") is None
    (tmp_path / "metrics.jsonl").touch()
    assert last_step(tmp_path / "metrics.jsonl") is None


@pytest.mark.parametrize("step", [7, None])
def test_write_exit(tmp_path, step):
    write_exit(tmp_path / "run", 75, "received SIGUSR1: saved", step)
    content = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert content == {"code": 75, "reason": "received SIGUSR1: saved", "step": step}


def test_write_exit_never_hides_the_error_it_reports(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    write_exit(tmp_path / "run", 1, "the real reason", None)
    assert (tmp_path / "run").read_text() == "a file where the folder should be"


def test_what_json_has_no_number_for_becomes_null(tmp_path):
    records = StepRecords(tmp_path / "metrics.jsonl", 0)
    records.write([{"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "sources": {"a": math.nan}}])
    records.close()
    read_back = {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "sources": {"a": None}}
    assert read_records(tmp_path / "metrics.jsonl") == [read_back]
    assert read_records(tmp_path / "nothing.jsonl") == []


def test_a_disk_that_takes_no_more_is_named(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/full'"), naming(str(tmp_path / "full")):
        (tmp_path / "full").write_text("x")


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_that_is_gone_is_a_fault_not_written_to_for_ever(tmp_path, moved):
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    records = StepRecords(path, 0)
    records.write([{"step": 1}])
    path.parent.rename(tmp_path / "moved") if moved else path.unlink()
    with pytest.raises(Fault, match=rf"^{path} was deleted, moved or replaced while the run wrote to it\."):
        records.write([{"step": 2}])
