"""Retention never deletes what a run could go on from."""

import errno
import os

from moh_megatron.checkpoint import save


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_keeps_the_newest(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 2, None, step=15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]


def test_a_damaged_later_one_pushes_no_good_one_out(tmp_path, tiny, fake_checkpoint):
    for step in (20, 25, 30):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    (tmp_path / "step_00000030" / "optimizer" / "state.pt").write_bytes(b"")
    save.prune(tmp_path, 1, None, step=25)
    assert names(tmp_path) == ["step_00000025", "step_00000030"]


def test_keeps_those_of_every_so_many_steps(tmp_path, tiny, fake_checkpoint):
    for step in range(5, 40, 5):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 2, 10, step=35)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (10, 20, 30, 35)]


def test_keeps_what_is_in_use(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15, 20):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, 1, None, step=20, in_use={10})
    assert names(tmp_path) == ["step_00000010", "step_00000020"]


def test_a_file_that_somebody_reads_fails_no_save(tmp_path, tiny, fake_checkpoint, monkeypatch):
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


def test_keeps_all_where_nobody_limits(tmp_path, tiny, fake_checkpoint):
    for step in (5, 10, 15):
        fake_checkpoint(tmp_path / f"step_{step:08d}", tiny(), step=step)
    save.prune(tmp_path, None, 10, step=15)
    assert len(names(tmp_path)) == 3
