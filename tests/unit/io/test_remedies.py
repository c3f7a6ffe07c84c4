"""remedy: every error of a file system has a way out that fits the command."""

import errno

import pytest

from moh_megatron.io.remedies import remedy, write_fault


@pytest.mark.parametrize(
    ("number", "by_setting", "by_argument"),
    [
        (
            errno.ENOSPC,
            "free some space or set run.dir to a disk that has more; finished checkpoints are intact",
            "free some space or name a disk that has more",
        ),
        (
            errno.EFBIG,
            "raise the limit on the size of a file (ulimit -f) or set run.dir to another file system",
            "raise the limit on the size of a file (ulimit -f) or name another file system",
        ),
        (errno.EROFS, "set run.dir to a folder that can be written", "name a folder that can be written"),
        (errno.EACCES, "change its permissions or use another path", "change its permissions or name another folder"),
        (
            errno.EIO,
            "the disk or the connection to it is failing: see the system's log, or set run.dir to another disk",
            "the disk or the connection to it is failing: see the system's log, or name another disk",
        ),
        (errno.EMFILE, "raise the limit on open files (ulimit -n)", "raise the limit on open files (ulimit -n)"),
        (errno.EINVAL, None, None),
        (None, None, None),
    ],
)
def test_remedy_names_the_setting_or_the_argument(number, by_setting, by_argument):
    assert remedy(number, "run.dir") == by_setting
    assert remedy(number) == by_argument


def test_checkpoints_are_mentioned_for_a_run_folder_only():
    assert "checkpoints" not in str(remedy(errno.EDQUOT, "data.dir"))


def test_write_fault_of_an_unknown_error_names_another_folder(tmp_path):
    error = OSError(errno.EINVAL, "Invalid argument")
    assert str(write_fault(tmp_path, error, "data.dir")) == (
        f"{tmp_path}: could not be written ([Errno 22] Invalid argument). Set data.dir to another folder. "
        "Then run the same command again. Existing files are unchanged."
    )
    assert "Name another folder. Then" in str(write_fault(tmp_path, error))
