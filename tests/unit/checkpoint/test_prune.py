"""prune: old checkpoints are deleted, but never one that a run could resume from."""

import errno
import os

from moh_megatron.checkpoint import save


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_newest_checkpoints_are_kept(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 2, None, step=15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]


def test_damaged_later_checkpoint_does_not_count(tmp_path, tiny, fake_checkpoint):
    for step in (20, 25, 30):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    (tmp_path / "step_00000030" / "optimizer" / "state.pt").write_bytes(b"")
    save.prune(tmp_path, 1, None, step=25)
    assert names(tmp_path) == ["step_00000025", "step_00000030"]


def test_checkpoints_of_every_nth_step_are_kept(tmp_path, tiny, fake_checkpoint):
    for step in range(5, 40, 5):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 2, 10, step=35)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30, 35)]


def test_checkpoints_in_use_are_kept(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15, 20):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 1, None, step=20, in_use={10})
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_checkpoint_that_cannot_be_deleted_is_removed_by_the_next_save(tmp_path, tiny, fake_checkpoint, monkeypatch):
    def refuse(path, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    for step in (5, 10):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    monkeypatch.setattr(os, "rmdir", refuse)
    save.prune(tmp_path, 1, None, step=10)
    assert names(tmp_path) == [".partial_step_00000005", "step_00000010"]
    monkeypatch.undo()
    save.make_room(tmp_path, 15)
    assert names(tmp_path) == [".partial_step_00000015", "step_00000010"]


def test_all_checkpoints_are_kept_without_a_limit(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, None, 10, step=15)
    assert len(names(tmp_path)) == 3
