"""The records of the starts of a run."""

import json

from moh_megatron.monitor.restarts import code_version, read_starts, record_start


def test_starts_are_counted(tmp_path):
    assert record_start(tmp_path, 0, ranks=2) == 0
    assert record_start(tmp_path, 30, ranks=4) == 1
    lines = (tmp_path / "restarts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ranks"] for line in lines] == [2, 4]
    assert code_version()


def test_a_line_that_was_cut_short_does_not_hide_later_ones(tmp_path):
    record_start(tmp_path, 0)
    with (tmp_path / "restarts.jsonl").open("a") as stream:
        stream.write('{"step": 10, "ti')
    assert record_start(tmp_path, 20) == 1
    assert record_start(tmp_path, 30) == 2
    assert [start["step"] for start in read_starts(tmp_path)] == [0, 20, 30]


def test_starts_under_the_former_file_name_are_counted_and_stay(tmp_path):
    former = tmp_path / "lives.jsonl"
    former.write_text('{"step": 0, "time": 1.0, "code": "git a"}\n{"step": 20, "time": 2.0, "code": "git a"}\n')
    before = former.read_bytes()
    assert record_start(tmp_path, 40) == 2
    assert record_start(tmp_path, 60) == 3
    assert former.read_bytes() == before
    assert len((tmp_path / "restarts.jsonl").read_text().splitlines()) == 2
    assert [start["step"] for start in read_starts(tmp_path)] == [0, 20, 40, 60]
