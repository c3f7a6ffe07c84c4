"""json_file: errors name what was expected, and files are written atomically."""

import json

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any, write_json


def test_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "漢字"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", "settings") == {"a": "漢字"}
    assert read_json_if_any(tmp_path / "a.json", "settings") == {"a": "漢字"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON (Expecting property name"),
        (b"[" * 100_000, "cannot be read as JSON (maximum recursion"),
        (b"\xff", "cannot be read as JSON ('utf-8' codec"),
        (b"[]", "must be settings: a JSON object. Got list."),
        (b"null", "must be settings: a JSON object. Got NoneType."),
        (None, "cannot be read as JSON ([Errno 21] Is a directory"),
        (..., "no such file. Expected settings."),
    ],
)
def test_file_without_a_json_object_is_a_user_error_naming_the_reason(tmp_path, content, message):
    file = tmp_path / "a.json"
    if content is None:
        file.mkdir()
    elif content is ...:
        file.symlink_to(tmp_path / "pruned")
    else:
        file.write_bytes(content)
    for read in (lambda: read_json(file, "settings", "Start again."), lambda: read_json_if_any(file, "settings")):
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{file}: {message}")
    with pytest.raises(UserError, match=r"Start again\.$"):
        read_json(file, "settings", "Start again.")


def test_absent_file_is_empty_for_read_json_if_any_only(tmp_path):
    assert read_json_if_any(tmp_path / "a.json", "settings") == {}
    with pytest.raises(UserError, match=r"no such file\. Expected settings\. Fetch or write it again\."):
        read_json(tmp_path / "a.json", "settings")


def test_error_of_the_disk_is_no_user_error(tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moh_megatron.io.small_file.os.open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_json(tmp_path / "a.json", "settings")


def test_lone_surrogate_is_written_as_an_escape(tmp_path):
    write_json(tmp_path / "a.json", {"a": "\ud800 é"})
    assert read_json(tmp_path / "a.json", "settings") == {"a": "\ud800 é"}


def test_write_json_creates_folders_replaces_and_keeps_unicode(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"text": "alt"})
    write_json(path, {"text": "naïve — 漢字", "n": 1.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"text": "naïve — 漢字", "n": 1.5}
    assert "漢字" in path.read_text(encoding="utf-8")
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})

    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())
