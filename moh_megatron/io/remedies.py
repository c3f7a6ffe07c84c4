"""What a user can do where the file system returns an error."""

from __future__ import annotations

import errno
from pathlib import Path

from moh_megatron.io.errors import Fault


def remedy(number: int | None, setting: str | None = None) -> str | None:
    """Advice for ``number``, the errno of an error of the operating system, or None if it is none of a file system's.

    Args:
        setting: the configuration key that names the folder, such as run.dir; None where the command line names it.
    """
    choose, another = ("name", "name another folder") if setting is None else (f"set {setting} to", "use another path")
    match number:
        case errno.ENOSPC | errno.EDQUOT:
            intact = "; finished checkpoints are intact" if setting == "run.dir" else ""
            return f"free some space or {choose} a disk that has more{intact}"
        case errno.EFBIG:
            return f"raise the limit on the size of a file (ulimit -f) or {choose} another file system"
        case errno.EROFS:
            return f"{choose} a folder that can be written"
        case errno.EACCES | errno.EPERM:
            return f"change its permissions or {another}"
        case errno.EIO:
            return f"the disk or the connection to it is failing: see the system's log, or {choose} another disk"
        case errno.ESTALE:
            return f"the file server lost or replaced it: see whether it is mounted, or {choose} another disk"
        case errno.ENOENT | errno.ENOTDIR | errno.EEXIST:
            return f"it was deleted, moved or replaced while it was in use: put it back, or {another}"
        case errno.EMFILE:
            return "raise the limit on open files (ulimit -n)"
        case errno.ENOMEM:
            return "give the process more memory (ulimit -v, or the job's limit)"
        case _:
            return None


def write_fault(folder: Path, error: OSError, setting: str | None = None) -> Fault:
    """The Fault for a ``folder`` that could not be written; see ``remedy``."""
    hint = remedy(error.errno, setting) or (
        "name another folder" if setting is None else f"set {setting} to another folder"
    )
    return Fault(
        f"{folder}: could not be written ({error}). {hint[0].upper()}{hint[1:]}. Then run the same command again. "
        "Existing files are unchanged."
    )
