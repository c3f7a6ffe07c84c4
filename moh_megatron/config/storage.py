"""What a user can do where the file system refuses."""

from __future__ import annotations

import errno


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
