"""Folders that appear whole or not at all, whatever ends their making."""

import os
import signal
from pathlib import Path

import pytest

from moh_megatron.checkpoint.whole import whole_folder
from moh_megatron.config.errors import UserError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_leaves_nothing_behind_and_says_so(number, tmp_path, capsys):
    def make() -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), number)
            (folder / "rest").write_text("never written")

    with pytest.raises(SystemExit) as ended:
        make()
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert f"out: ended by {number.name} before it was whole" in capsys.readouterr().err
    assert signal.getsignal(number) is signal.SIG_DFL


def test_who_handles_the_signal_already_goes_on(tmp_path):
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with whole_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert (tmp_path / "out").is_dir()


def test_what_is_replaced_comes_back_where_the_replacement_is_interrupted(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        done = rename(self, to)
        if self == target:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), whole_folder(target):
        pass
    assert (target / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "replaced", ".replaced"])
def test_a_folder_of_any_name_is_replaced(name, tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / name) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]


@pytest.mark.parametrize("place", ["file/out", "file/further/out"])
def test_a_file_in_the_way_is_the_users_mistake(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    stands = r"file/.*: a file stands where a folder is needed, at .*file"
    with pytest.raises(UserError, match=stands), whole_folder(tmp_path / place):
        pass
