import gzip
import json
from pathlib import Path

import pytest

from moh_megatron.config.errors import UserError
from moh_megatron.config.schema import DataConfig
from moh_megatron.data.text import find_files, read_documents


def read(path: Path, **settings: str) -> list[str]:
    return list(read_documents(find_files([str(path)]), DataConfig(**settings)))  # pyright: ignore[reportArgumentType]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_gives_the_field_of_each_record(tmp_path: Path, name: str) -> None:
    records = [{"text": "one"}, {"text": ""}, {"text": "two\nlines é 😀", "other": 1}]
    content = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()
    assert read(write(tmp_path / name, content)) == ["one", "two\nlines é 😀"]
    assert read(write(tmp_path / name, b'{"body": "x"}'), text_key="body") == ["x"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["one\r\ntwo\n\n \nthree\n\n\n"]),
        ("paragraph", ["one\r\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_units(tmp_path: Path, name: str, unit: str, expected: list[str]) -> None:
    content = b"\xef\xbb\xbfone\r\ntwo\n\n \nthree\n\n\n"
    assert read(write(tmp_path / name, content), text_unit=unit) == expected


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "*")])
    assert [path.name for path in found] == ["c.jsonl", "a.txt", "b.txt"]


def test_advance_is_told_every_byte_on_disk(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", b"".join(b'{"text": "%d"}\n' % number for number in range(5000)))
    told: list[int] = []
    assert len(list(read_documents([path], DataConfig(), told.append))) == 5000
    assert sum(told) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b" \n\n", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: holds no text"),
        ("a.txt", b"good\nb\xc3\xa9 \xff", r"a.txt, line 2: not UTF-8 \(value 0xff at byte 5 of the line, offset 9 "),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "x"\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["x"]\n', "a.jsonl, line 1: expected a JSON object with the field 'text'. Got list"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: no field 'text'; the record has 'body'. Set data.text_key"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' must be a string. Got int"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: field 'text' holds a lone surrogate"),
    ],
)
def test_bad_text_is_named_by_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / name, content))


def test_broken_gzip_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", bytes(range(128)) * 1000)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.gz: the gzip stream is cut off"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"a\.txt\.gz: not a sound gzip file"):
        read(path)


def test_missing_and_unknown_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").touch()
    for pattern, message in {
        "no.txt": r"no\.txt does not exist",
        "*.txt": "no file matches",
        "a.pdf": r"a\.pdf is not of a known kind: \.jsonl, ",
        "": "is a folder; name its files",
    }.items():
        with pytest.raises(UserError, match=message):
            find_files([str(tmp_path / pattern)])
    with pytest.raises(UserError, match=r"data\.inputs is empty"):
        find_files([])
