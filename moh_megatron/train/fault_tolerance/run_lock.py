"""Locks a run folder: rank 0 holds the lock, whichever launcher started it, so that only one run writes there."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from moh_megatron.io.errors import UserError

_LOCK = ".lock"
_TIMEOUT_SECONDS = 120.0
"""How long to wait for a holder on another machine. A file server keeps the locks of a lost client for its lease (90 s
for NFSv4), and a job that is started again may arrive before the lease is over."""
_POLL_SECONDS = 1.0


class RunFolderInUse(UserError):
    """Another run holds the folder; this run must not write anything there."""


class RunLock:
    """The lock of a run folder, held from construction on; the system releases it when this process ends in any way.

    It uses flock, which NFS and Lustre keep across machines unless they are mounted without locks; then nothing is
    held.

    Raises:
        RunFolderInUse: a process on this machine holds the lock, or one on another machine did not release it in time.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not self._acquire():
            host, _, process = os.pread(self._handle, 1000, 0).decode(errors="replace").strip().partition(" ")
            if host in ("", socket.gethostname()) or time.monotonic() > deadline:
                self.release()
                holder = f"process {process} on {host}" if process else "another process"
                raise RunFolderInUse(
                    f"{run_dir}: {holder} trains in this folder. Wait for it, or set run.dir to another one."
                )
            time.sleep(_POLL_SECONDS)

    def _acquire(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            return False
        except OSError:
            pass  # The file system has no locks, or is full.
        return True

    def release(self) -> None:
        """Release the lock before this process ends."""
        os.close(self._handle)
