"""What a user can do where the file system refuses."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from tempfile import TemporaryFile

from moh_megatron.io.errors import UserError


def check_folder(folder: Path) -> None:
    """Raise UserError unless results can be written to ``folder``; tried out, before they are measured.

    Where it is not there it is made for the trial, and removed again.
    """
    made: list[Path] = []
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: must be a folder to write to. Got: {error.strerror}; name another with --out."
        ) from None
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def remedy(number: int | None) -> str | None:
    """The way out of the error ``number`` of the operating system, or None if it is none of a disk's."""
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space or set run.dir to a disk that has more; finished checkpoints are intact"
        case errno.EFBIG:
            return "raise the limit on the size of a file (ulimit -f) or set run.dir to another file system"
        case errno.EROFS:
            return "set run.dir to a folder that can be written"
        case errno.EACCES | errno.EPERM:
            return "change its permissions or use another path"
        case errno.EIO:
            return "the disk or the way to it is failing: see the system's log, or set run.dir to another disk"
        case errno.ESTALE:
            return "the file server lost or replaced it: see whether it is mounted, or set run.dir to another disk"
        case errno.ENOENT | errno.ENOTDIR | errno.EEXIST:
            return "it was deleted, moved or replaced while the run used it: put it back, or use another path"
        case _:
            return None
