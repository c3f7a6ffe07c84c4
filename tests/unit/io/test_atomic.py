"""atomic_folder: the folder appears complete or not at all, whatever ends the block."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from moh_megatron.io import atomic
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.folders import refuse_unless_new


@pytest.fixture
def default_handlers():
    """Signals with their default handlers; under nohup SIGHUP is ignored, in the background Ctrl-C is."""
    defaults = {
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    # atomic_folder has put them back.
    assert {number: signal.getsignal(number) for number in defaults} == defaults
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_signal_removes_the_folder_and_is_reported(number, tmp_path, caplog):
    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), number)
            (folder / "rest").write_text("never written")

    with pytest.raises(SystemExit) as ended:
        write()
    assert ended.value.code == 128 + number
    assert not list(tmp_path.iterdir())
    assert f"out: ended by {number.name} before it was complete. Nothing was left behind." in caplog.text


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_during_replacement_waits_until_the_old_folder_is_removed(number, tmp_path, caplog, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    unlink = os.unlink

    def unlink_during_signal(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        unlink(*arguments, **options)

    def replace() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "new").touch()
            monkeypatch.setattr(os, "unlink", unlink_during_signal)

    with pytest.raises(BaseException) as ended:
        replace()
    assert isinstance(ended.value, KeyboardInterrupt if number == signal.SIGINT else SystemExit)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
    assert f"out: ended by {number.name}, which is complete." in caplog.text


@pytest.mark.usefixtures("default_handlers")
def test_second_ctrl_c_does_not_interrupt_the_clean_up(tmp_path, caplog, monkeypatch):
    unlink = os.unlink

    def unlink_during_signal(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        unlink(*arguments, **options)

    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            monkeypatch.setattr(os, "unlink", unlink_during_signal)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    assert "out: ended by SIGINT before it was complete. Nothing was left behind." in caplog.text


def test_permission_error_names_its_remedy(tmp_path):
    def refused() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            raise PermissionError(13, "Permission denied", str(folder / "x"))

    with pytest.raises(Fault, match=r"Permission denied.*Change its permissions or name another folder\."):
        refused()


def test_handler_of_the_program_stays_in_place(tmp_path):
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with atomic_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert (tmp_path / "out").is_dir()


def test_old_folder_comes_back_when_replacement_is_interrupted(tmp_path, monkeypatch):
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
def test_existing_folder_is_replaced_whatever_its_name(name, tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / name) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["new"]


@pytest.mark.parametrize("path", ["file/out", "file/further/out"])
def test_file_in_place_of_a_parent_folder_is_a_user_error(tmp_path, path):
    (tmp_path / "file").write_text("a file")
    message = r"file/.*: a file stands where a folder is needed, at .*file"
    with pytest.raises(UserError, match=message), atomic_folder(tmp_path / path):
        pass


def test_created_parent_folders_are_removed_on_failure(tmp_path):
    (tmp_path / "existing").mkdir()

    def refused() -> None:
        with atomic_folder(tmp_path / "existing" / "n1" / "n2" / "out"):
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused()
    assert [path.name for path in tmp_path.rglob("*")] == ["existing"]


def test_created_parent_folder_stays_when_another_process_uses_it(tmp_path):
    def refused() -> None:
        with atomic_folder(tmp_path / "n1" / "out"):
            (tmp_path / "n1" / "theirs").touch()
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["n1", "theirs"]


@pytest.mark.parametrize("empty", [True, False], ids=["to_an_empty_folder", "to_nothing"])
def test_link_stays_and_its_target_is_filled(tmp_path, empty):
    (tmp_path / "disk").mkdir()
    linked = tmp_path / "disk" / "out"
    if empty:
        linked.mkdir()
    (tmp_path / "link").symlink_to(linked)
    refuse_unless_new(tmp_path / "link")
    with atomic_folder(tmp_path / "link") as folder:
        assert folder.is_relative_to(tmp_path / "disk"), "a folder cannot be renamed to another disk"
        (folder / "content").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in linked.iterdir()] == ["content"]
    assert [path.name for path in linked.parent.iterdir()] == ["out"]


def test_path_with_parent_references_is_resolved(tmp_path):
    with atomic_folder(tmp_path / "x" / ".." / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("path", ["{long}", "n1/{long}", "n1/{long}/out"])
def test_too_long_name_is_a_user_error(tmp_path, path):
    target = tmp_path / path.format(long="n" * 300)
    with pytest.raises(UserError, match=r"n: cannot be a folder|out: cannot be a folder"), atomic_folder(target):
        pass
    assert not list(tmp_path.iterdir())


def test_longest_possible_name_is_written_and_replaced(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / ("n" * 255)) as folder:
            (folder / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["n" * 255, "new"]


def leftover(path: Path, number: int) -> Path:
    """A temporary folder for ``path`` as a process leaves it that is killed before it removes it."""
    folder = path.with_name(f"{atomic._prefix(path)}{number}")
    (folder / "new" / path.name).mkdir(parents=True)
    return folder


@pytest.fixture
def locked():
    """Locks a folder as a process does that lives."""
    handles = []

    def lock(folder: Path) -> None:
        handles.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(handles[-1], fcntl.LOCK_EX)

    yield lock
    for handle in handles:
        os.close(handle)


def test_leftovers_of_killed_processes_are_removed_and_those_of_others_kept(tmp_path, locked):
    dead, alive = (leftover(tmp_path / "out", number) for number in (1, 2))
    other = leftover(tmp_path / "out2", 1)
    foreign = tmp_path / ".out.partial.another_machine.1"
    foreign.mkdir()
    locked(alive)
    with atomic_folder(tmp_path / "out"):
        assert not dead.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", alive.name, other.name, foreign.name}


def test_folder_that_a_killed_process_was_replacing_comes_back(tmp_path):
    moved_away = leftover(tmp_path / "out", 1) / "old" / "out"
    moved_away.mkdir(parents=True)
    (moved_away / "content").touch()

    def refused() -> None:
        with atomic_folder(tmp_path / "out"):
            raise UserError("refused")

    with pytest.raises(UserError, match="refused"):
        refused()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "content"]


def test_temporary_folder_is_locked_while_it_is_filled(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "first").touch()
        with atomic_folder(tmp_path / "out") as other:
            (other / "second").touch()
        assert (folder / "first").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_file_system_without_locks_keeps_leftovers(tmp_path, monkeypatch):
    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    dead = leftover(tmp_path / "out", 1)
    with atomic_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", dead.name}


def test_temporary_folder_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    flock, removed = fcntl.flock, []

    def remove_first(handle: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob(".out.*"))
            removed[0].rmdir()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with atomic_folder(tmp_path / "out") as folder:
        assert not folder.is_relative_to(removed[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        (None, r"Free some space or name a disk that has more\."),
        ("data.dir", r"Free some space or set data\.dir to a disk that has more\."),
        ("run.dir", r"Free some space or set run\.dir to a disk that has more; finished checkpoints are intact\."),
    ],
)
def test_full_disk_leaves_the_old_folder_and_names_the_remedy(tmp_path, setting, remedy):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def fill() -> None:
        with atomic_folder(tmp_path / "out", setting):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Fault, match=rf"out: could not be written \(.*No space left on device\)\. {remedy}"):
        fill()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_error_of_reading_another_file_is_not_changed(tmp_path):
    def read() -> None:
        with atomic_folder(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "source"))

    with pytest.raises(PermissionError):
        read()
    assert not list(tmp_path.iterdir())
