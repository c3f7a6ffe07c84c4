"""Checks of target folders, made before there is anything to write."""

from pathlib import Path

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import check_writable, refuse_inside, refuse_unless_new, resolve_target


def test_links_in_a_circle_are_a_user_error(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: cannot be a folder \(.*\)\. Name another one"):
        refuse_unless_new(tmp_path / "a")


@pytest.mark.parametrize("name", [".", "", "x/..", "../current"])
def test_working_directory_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    for check in (refuse_unless_new, resolve_target):
        with pytest.raises(UserError, match="must be another folder than the one this command runs in"):
            check(Path(name))


@pytest.mark.parametrize("path", ["source", "source/out", "link/out", "source/x/../out"])
def test_target_inside_its_source_is_refused(tmp_path, path):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match=r"must lie outside what is converted, .*source"):
        refuse_inside(tmp_path / path, tmp_path / "source")
    refuse_inside(tmp_path / "source_of_another", tmp_path / "source")


def test_check_writable_leaves_nothing_and_names_the_option(tmp_path):
    check_writable(tmp_path / "new" / "results")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/results: must be a folder to write to\. Got: Not a.*name another with --out"
    ):
        check_writable(tmp_path / "file" / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_refuse_unless_new_accepts_absent_and_empty_folders_only(tmp_path):
    refuse_unless_new(tmp_path / "out")
    (tmp_path / "out").mkdir()
    refuse_unless_new(tmp_path / "out")
    (tmp_path / "out" / "content").touch()
    with pytest.raises(UserError, match=r"out: must be new or empty\. Got something there; use run\.dir, or move it"):
        refuse_unless_new(tmp_path / "out", "use run.dir")
    with pytest.raises(UserError, match=r"content: must be new or empty"):
        refuse_unless_new(tmp_path / "out" / "content")
