"""Tests of read_documents on text files, and of find_inputs."""

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest

from moh_megatron.config.schema import DataConfig
from moh_megatron.data.prepare.chunks import Chunk
from moh_megatron.data.prepare.inputs import Segment, find_inputs
from moh_megatron.data.prepare.read_documents import Event, Reject, SegmentEnd, read_segment
from moh_megatron.io.errors import UserError


def read_events(path: Path, advance=lambda count: None, **settings) -> list[Event]:
    (source,) = find_inputs([str(path)])
    found = list(read_segment(source, Segment(0, 0, None, source.bytes), DataConfig(**settings), advance))
    assert isinstance(found.pop(), SegmentEnd)
    return found


def read(path: Path, **settings) -> list[str]:
    """The texts of the documents; there must be no reject."""
    found = read_events(path, **settings)
    assert all(isinstance(event, Chunk) and event.last for event in found), found
    return [event.text for event in found if isinstance(event, Chunk)]


def write_file(path: Path, content: bytes) -> Path:
    """Write ``content``, compressed as the suffix says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst"])
def test_jsonl_documents_are_the_configured_field(tmp_path: Path, name: str) -> None:
    records = [{"text": "one"}, {"text": ""}, {"text": "two\nlines é 😀", "other": 1}]
    content = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    assert read(write_file(tmp_path / name, content)) == ["one", "", "two\nlines é 😀"]
    assert read(write_file(tmp_path / name, b'{"body": "x"}'), text_key="body") == ["x"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\r\ntwo\n\n \nthree\n\n\n"]),
        ("paragraph", ["one\r\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_txt_documents_are_files_paragraphs_or_lines(tmp_path: Path, name: str, unit: str, expected: list[str]) -> None:
    content = b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n\n\n"
    assert read(write_file(tmp_path / name, content), text_unit=unit) == expected


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "*")])
    assert [Path(source.name).name for source in found] == ["c.jsonl", "a.txt", "b.txt"]
    assert [Path(source.name).name for source in find_inputs([str(tmp_path)])] == ["a.txt", "b.txt", "c.jsonl"]


def test_empty_text_is_no_input() -> None:
    with pytest.raises(
        UserError, match=r"^data\.inputs: must name files or folders\. Got an empty text; take it out\.$"
    ):
        find_inputs([""])


def test_pipe_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl must be a regular file\. Got a pipe or a device; write a file"):
        find_inputs([str(tmp_path / "a.jsonl")])


def test_folder_includes_json_but_not_the_description_of_a_saved_dataset(tmp_path: Path) -> None:
    for name in ("a.json.gz", "saved/state.json", "saved/dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [Path(source.name).name for source in find_inputs([str(tmp_path)])] == ["a.json.gz"]


def test_advance_receives_every_byte_on_disk(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.jsonl.gz", b"".join(b'{"text": "%d"}\n' % number for number in range(5000)))
    reported: list[int] = []
    assert len(read_events(path, reported.append)) == 5000
    assert sum(reported) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "line", "reason"),
    [
        ("a.txt", b"", 1, "the file holds no text"),
        ("a.txt", b" \n\n", 1, "the file holds no text"),
        ("a.jsonl", b"\n", 1, "the file holds no text"),
        ("a.txt", b"good\nb\xc3\xa9 \xff", 2, "not UTF-8 (value 0xff at byte 5 of the line, offset 9 of the text)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', 2, "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x"\n', 2, "not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"n": ' + b"9" * 5000 + b"}\n", 2, "an integer of more than 4,300 digits"),
        ("a.jsonl", b"[" * 100_000, 1, "not JSON"),
        ("a.jsonl", b'["x"]\n', 1, "expected a JSON object with field 'text'. Got list"),
        ("a.jsonl", b'{"body": "x"}\n', 1, "no field 'text'; the record has 'body'. Set data.text_key"),
        ("a.jsonl", b'{"text": 3}\n', 1, "field 'text' must be a string. Got int"),
        ("a.jsonl", b'\n\n{"text": "\\ud800"}\n', 3, "field 'text' holds a lone surrogate"),
    ],
)
def test_only_the_bad_record_is_rejected(tmp_path: Path, name: str, content: bytes, line: int, reason: str) -> None:
    (reject,) = [event for event in read_events(write_file(tmp_path / name, content)) if isinstance(event, Reject)]
    assert reject.line == line
    assert reject.reason.startswith(reason)
    if name.endswith(".jsonl"):
        after = write_file(tmp_path / name, content + b'\n{"text": "after"}\n')
        assert read_events(after)[-1] == Chunk("after", b"after", True)


def test_long_record_is_rejected_with_its_size(tmp_path: Path) -> None:
    exact = b'{"text": "' + b"x" * 88 + b'"}'
    path = write_file(tmp_path / "a.jsonl", exact + b"\n" + exact + b" \n" + b"y" * 3_000_000 + b"\n" + exact)
    chunk = Chunk("x" * 88, b"x" * 88, True)
    assert read_events(path, max_record_bytes=100) == [
        chunk,
        Reject(2, "a record of 102 bytes, more than data.max_record_bytes (100)"),
        Reject(3, "a record of 3,000,001 bytes, more than data.max_record_bytes (100)"),
        chunk,
    ]


def test_template_joins_fields(tmp_path: Path) -> None:
    record = {"title": "A {title}", "body": "Text.", "n": 1}
    path = write_file(tmp_path / "a.jsonl", json.dumps(record).encode())
    assert read(path, template="# {title}\n\n{body}{{}}") == ["# A {title}\n\nText.{}"]
    (reject,) = read_events(path, template="{n}")
    assert isinstance(reject, Reject)
    assert "field 'n' must be a string. Got int" in reject.reason


def test_error_names_the_broken_gzip_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt.gz", bytes(range(128)) * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.gz: the gzip stream is truncated"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a\.txt\.gz: not a valid gzip file"):
        read(path)


def test_error_names_the_broken_zstd_file(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.txt.zst", bytes(range(128)) * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.zst: the zstd stream is truncated"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a\.txt\.zst: not a valid zstd file"):
        read(path)


def zstd_frame(content: bytes, window_descriptor: int) -> bytes:
    """A zstd frame of one uncompressed block (RFC 8878), with any window."""
    block_header = (1 | len(content) << 3).to_bytes(3, "little")
    return bytes.fromhex("28b52ffd") + bytes([0, window_descriptor]) + block_header + content


def test_zstd_file_with_a_large_window_is_refused_with_window_and_remedy(tmp_path: Path) -> None:
    # The descriptor holds the exponent above 10 in its upper five bits, and eighths of it in the lower three.
    path = write_file(tmp_path / "a.txt", b"") and tmp_path / "b.txt.zst"
    path.write_bytes(zstd_frame(b"some text", 17 << 3))
    assert read(path) == ["some text"], "128 MiB, the most of zstd without --long"
    skippable = (0x184D2A53).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    for start in (b"", skippable):
        for descriptor, mib in ((21 << 3, "2,048"), (18 << 3 | 4, "384"), (17 << 3 | 1, "144")):
            path.write_bytes(start + zstd_frame(b"some text", descriptor))
            with pytest.raises(
                UserError, match=rf"b\.txt\.zst: the window .* at most 128 MiB\. Got a window of {mib} MiB"
            ):
                read(path)
    with pytest.raises(
        UserError, match=r"zstd -d --long=31 .*b\.txt\.zst -o .*b\.txt && zstd --rm -f .*b\.txt, or give"
    ):
        read(path)
    path.write_bytes(zstd_frame(b"some text\n", 0) + zstd_frame(b"some text", 21 << 3))
    with pytest.raises(UserError, match=r"at most 128 MiB\. Got a larger one"):
        read(path)


def test_error_names_missing_and_unknown_files(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    for pattern, message in {
        "no.txt": r"no\.txt does not exist",
        "*.txt": "no file matches",
        "a.pdf": r"a\.pdf is not of a known kind: \.jsonl, ",
        "": "is a folder without a file of a known kind",
    }.items():
        with pytest.raises(UserError, match=message):
            find_inputs([str(tmp_path / pattern)])
    with pytest.raises(UserError, match=r"data\.inputs is empty"):
        find_inputs([])
