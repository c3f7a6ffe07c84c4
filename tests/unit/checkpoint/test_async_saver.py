"""AsyncSaver: checkpoints are complete or absent, written one at a time, and errors are reported."""

from __future__ import annotations

import errno
import os
import shutil
import threading

import pytest
import torch
import torch.distributed as dist

from moh_megatron.checkpoint import layout, save
from moh_megatron.checkpoint.async_saver import AsyncSaver
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.checkpoint.save import Snapshot
from moh_megatron.io.errors import Fault

pytestmark = pytest.mark.usefixtures("one_rank")


class Tokenizer:
    def save(self, folder):
        (folder / "more").mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "more" / "notes.txt").write_text("a file in a folder")


class Engine:
    """What a checkpoint needs of an engine, with tensors of ones."""

    updates = 3

    def __init__(self, config):
        self.tensors = {rule.megatron: torch.ones(rule.shape) for rule in rules(config)}

    def weights(self):
        yield from [*self.tensors.items(), ("decoder._extra_state", torch.zeros(1))]

    def optimizer_tensors(self):
        for name, tensor in self.tensors.items():
            yield f"exp_avg/{name}", tensor


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saver(root):
    group = dist.group.WORLD
    assert group is not None
    return AsyncSaver(root, group)


@pytest.fixture
def blocked_write(monkeypatch):
    """The background write waits until this event is set."""
    event, write_part = threading.Event(), save.write_part

    def wait(*arguments):
        assert event.wait(60)
        return write_part(*arguments)

    monkeypatch.setattr(save, "write_part", wait)
    yield event
    event.set()


def snapshot(config, step):
    return Snapshot.take(config, step, "d" * 64, Tokenizer(), Engine(config))


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_saved_checkpoint_is_complete(saver, root, tiny):
    saver.begin(snapshot(tiny(), 5))
    saver.finish()
    assert names(root) == ["latest", "step_00000005"]
    assert (root / "latest").read_text() == "step_00000005\n"
    folder = root / "step_00000005"
    assert layout.problem_with(folder) is None
    manifest = layout.read_state(folder)
    assert (manifest.step, manifest.tokens, manifest.data) == (5, 5 * 4 * 16, "d" * 64)
    assert "tokenizer/more/notes.txt" in manifest.files
    assert layout.read_config(folder) == tiny()
    assert layout.read_weights(folder).keys() == Engine(tiny()).tensors.keys()


def test_checkpoint_is_invisible_before_it_is_complete(saver, root, tiny, blocked_write):
    saver.begin(snapshot(tiny(), 5))
    for _ in range(3):
        saver.advance()
        assert names(root) == [".partial_step_00000005"]
    blocked_write.set()
    saver.finish()
    assert names(root) == ["latest", "step_00000005"]


def test_training_during_the_save_does_not_change_the_checkpoint(saver, root, tiny, blocked_write):
    engine = Engine(tiny())
    saver.begin(Snapshot.take(tiny(), 5, "d" * 64, Tokenizer(), engine))
    for tensor in engine.tensors.values():
        tensor.zero_()
    blocked_write.set()
    saver.finish()
    assert all((tensor == 1).all() for tensor in layout.read_weights(root / "step_00000005").values())


def test_second_save_waits_for_the_first(saver, root, tiny, blocked_write):
    saver.begin(snapshot(tiny(), 5))
    second = threading.Thread(target=lambda: saver.begin(snapshot(tiny(), 10)))
    second.start()
    second.join(0.5)
    assert second.is_alive()
    assert names(root) == [".partial_step_00000005"]
    blocked_write.set()
    second.join(60)
    saver.finish()
    assert names(root) == ["latest", "step_00000005", "step_00000010"]
    assert (root / "latest").read_text() == "step_00000010\n"


@pytest.mark.parametrize("phase", ["write_part", "commit"])
def test_full_disk_is_reported_and_leaves_older_checkpoints(saver, root, tiny, monkeypatch, phase):
    saver.begin(snapshot(tiny(), 5))
    saver.finish()

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, phase, refuse)
    saver.begin(snapshot(tiny(), 10))
    with pytest.raises(Fault, match=r"step 10 cannot be written .*No space left .* checkpoint: step_00000005\.$"):
        saver.finish()
    assert layout.resolve_checkpoint(root).name == "step_00000005"
    assert (root / "latest").read_text() == "step_00000005\n"


@pytest.mark.parametrize(
    ("number", "what", "remedy"),
    [
        (errno.EFBIG, "File too large", "ulimit -f"),
        (errno.EIO, "Input/output error", "The disk or the connection to it is failing"),
        (errno.ESTALE, "Stale file handle", "The file server lost or replaced it"),
        (errno.ENOTDIR, "Not a directory", "It was deleted, moved or replaced"),
    ],
)
def test_file_system_error_is_reported_with_path_and_remedy(saver, root, tiny, monkeypatch, number, what, remedy):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number), str(root / "file"))

    monkeypatch.setattr(save, "write_part", refuse)
    saver.begin(snapshot(tiny(), 10))
    with pytest.raises(Fault, match=f"cannot be written to {root}.*{what}: '{root}/file'.*{remedy}"):
        saver.finish()


def test_deleted_run_folder_is_not_created_again(saver, root, tiny, blocked_write):
    saver.begin(snapshot(tiny(), 5))
    shutil.rmtree(root)
    blocked_write.set()
    with pytest.raises(Fault, match=r"No such file or directory.*It was deleted, moved or replaced"):
        saver.finish()
    root.parent.rename(root.parent.with_name("elsewhere"))
    with pytest.raises(Fault, match=r"No such file or directory.*It was deleted, moved or replaced"):
        saver.begin(snapshot(tiny(), 10))
    assert not root.parent.exists()


def test_too_little_space_is_reported_before_anything_is_written(saver, root, tiny, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(Fault, match=r"MiB needed, 0 MiB free\..*Newest complete checkpoint: none\.$"):
        saver.begin(snapshot(tiny(), 5))
    saver.finish()
    assert not (root / "step_00000005").exists()


def test_error_that_is_not_of_the_disk_is_raised_unchanged(saver, tiny, monkeypatch):
    def stumble(*arguments):
        raise KeyError("a bug")

    monkeypatch.setattr(save, "write_part", stumble)
    saver.begin(snapshot(tiny(), 5))
    with pytest.raises(KeyError, match="a bug"):
        saver.finish()


def test_later_checkpoint_passed_over_is_not_named_as_the_newest(saver, root, tiny, fake_checkpoint, monkeypatch):
    for step in (5, 10, 15):
        fake_checkpoint(root / f"step_{step:08d}", tiny(), step=step)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(Fault, match=r"Newest complete checkpoint: step_00000005\.$"):
        saver.begin(snapshot(tiny(), 10))


def test_checkpoints_in_use_are_not_deleted(saver, root, tiny):
    for step, in_use in ((4, set()), (5, {4}), (6, {4}), (7, set())):
        saver.begin(snapshot(tiny({"checkpoint.keep_last": 1}), step), in_use)
        saver.finish()
        assert names(root) == ["latest", *(f"step_{number:08d}" for number in sorted({*in_use, step}))]


def test_damaged_checkpoint_of_the_same_step_is_replaced(saver, root, tiny):
    for _ in range(2):
        saver.begin(snapshot(tiny(), 5))
        saver.finish()
        assert layout.problem_with(root / "step_00000005") is None
        assert names(root) == ["latest", "step_00000005"]
        (root / "step_00000005" / "config.yaml").write_text("")


def test_retention_keeps_the_newest_and_every_nth_step(saver, root, tiny):
    for step in (4, 5, 6, 7):
        saver.begin(snapshot(tiny({"checkpoint.keep_last": 1, "checkpoint.keep_every": 5}), step))
        saver.finish()
    assert names(root) == ["latest", "step_00000005", "step_00000007"]
