"""Folders that appear whole or not at all, whatever ends their making."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from moh_megatron.io.atomic import atomic_folder, place_of, refuse_inside, refuse_unless_new
from moh_megatron.io.errors import Fault, UserError


@pytest.fixture
def nobody_listens():
    """Requests to end that nothing handles or ignores; under nohup SIGHUP is ignored, in the background Ctrl-C."""
    usual = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    # Each time as it was found.
    assert {number: signal.getsignal(number) for number in usual} == usual
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("nobody_listens")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_leaves_nothing_behind_and_says_so(number, tmp_path, capsys):
    def make() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), number)
            (folder / "rest").write_text("never written")

    with pytest.raises(SystemExit) as ended:
        make()
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert f"out: ended by {number.name} before it was whole" in capsys.readouterr().err


@pytest.mark.usefixtures("nobody_listens")
@pytest.mark.parametrize("asks", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_waits_until_what_is_replaced_is_gone(asks, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    unlink = os.unlink

    def asked_to_end(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), asks)
        unlink(*given, **named)

    def replace() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "new").touch()
            monkeypatch.setattr(os, "unlink", asked_to_end)

    with pytest.raises(BaseException) as ended:
        replace()
    assert isinstance(ended.value, KeyboardInterrupt if asks == signal.SIGINT else SystemExit)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    assert f"out: ended by {asks.name}, which is whole." in capsys.readouterr().err


@pytest.mark.usefixtures("nobody_listens")
def test_a_second_ctrl_c_does_not_interrupt_the_tidying_up(tmp_path, capsys, monkeypatch):
    unlink = os.unlink

    def impatient(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        unlink(*given, **named)

    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            monkeypatch.setattr(os, "unlink", impatient)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    assert "out: ended by SIGINT before it was whole. Nothing was left behind." in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_says_so(tmp_path):
    def refused() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            raise PermissionError(13, "Permission denied", str(folder / "x"))

    with pytest.raises(Fault, match=r"Permission denied.*Change its permissions, or name another folder"):
        refused()


def test_who_handles_the_signal_already_goes_on(tmp_path):
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with atomic_folder(tmp_path / "out"):
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
    with pytest.raises(KeyboardInterrupt), atomic_folder(target):
        pass
    assert (target / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "replaced", ".replaced"])
def test_a_folder_of_any_name_is_replaced(name, tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]


@pytest.mark.parametrize("place", ["file/out", "file/further/out"])
def test_a_file_in_the_way_is_the_users_mistake(tmp_path, place):
    (tmp_path / "file").write_text("a file")
    stands = r"file/.*: a file stands where a folder is needed, at .*file"
    with pytest.raises(UserError, match=stands), atomic_folder(tmp_path / place):
        pass


def test_folders_made_on_the_way_vanish_with_a_refusal(tmp_path):
    (tmp_path / "there").mkdir()

    def refused() -> None:
        with atomic_folder(tmp_path / "there" / "n1" / "n2" / "out"):
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_one_that_another_filled_meanwhile_stays(tmp_path):
    def refused() -> None:
        with atomic_folder(tmp_path / "n1" / "out"):
            (tmp_path / "n1" / "theirs").touch()
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["n1", "theirs"]


@pytest.mark.parametrize("empty", [True, False], ids=["to_an_empty_folder", "to_nothing"])
def test_a_link_stays_and_what_it_names_is_filled(tmp_path, empty):
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk" / "out"
    if empty:
        place.mkdir()
    (tmp_path / "link").symlink_to(place)
    refuse_unless_new(tmp_path / "link")
    with atomic_folder(tmp_path / "link") as folder:
        assert folder.is_relative_to(tmp_path / "disk"), "a folder cannot be renamed to another disk"
        (folder / "content").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in place.iterdir()] == ["content"]
    assert [path.name for path in place.parent.iterdir()] == ["out"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"a: cannot be a folder \(.*\)\. Name another one"):
        refuse_unless_new(tmp_path / "a")


@pytest.mark.parametrize("name", [".", "", "x/..", "../here"])
def test_the_folder_one_stands_in_is_not_replaced(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for check in (refuse_unless_new, place_of):
        with pytest.raises(UserError, match="must be another folder than the one this command runs in"):
            check(Path(name))


def test_a_way_back_up_is_followed(tmp_path):
    with atomic_folder(tmp_path / "x" / ".." / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["{long}", "n1/{long}", "n1/{long}/out"])
def test_a_name_that_no_file_system_takes(tmp_path, place):
    target = tmp_path / place.format(long="n" * 300)
    with pytest.raises(UserError, match=r"n: cannot be a folder|out: cannot be a folder"), atomic_folder(target):
        pass
    assert not list(tmp_path.iterdir())


def test_the_longest_name_that_a_file_system_takes(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / ("n" * 255)) as folder:
            (folder / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["n" * 255, "new"]


@pytest.mark.parametrize("place", ["source", "source/out", "link/out", "source/x/../out"])
def test_what_is_made_lies_outside_what_it_is_made_of(tmp_path, place):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    with pytest.raises(UserError, match=r"must lie outside what is converted, .*source"):
        refuse_inside(tmp_path / place, tmp_path / "source")
    refuse_inside(tmp_path / "source_of_another", tmp_path / "source")
