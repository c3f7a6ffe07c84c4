"""One run folder, one run: whoever starts the ranks (our launcher, torchrun, srun), rank 0 holds the folder's lock."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from moh_megatron.io.errors import UserError

_LOCK = ".lock"
_PATIENCE_SECONDS = 120.0
"""How long a holder on another machine is waited for: a file server keeps the locks of a lost client for its lease,
90 s for NFSv4, and a job that is started again may be here before that is over."""
_POLL_SECONDS = 1.0


class Occupied(UserError):
    """Another run is in the folder: nothing in it is this one's to write."""


class RunLock:
    """The lock of a run folder, held from here on; the system lets go of it when this process ends, however it ends.

    It is flock's, which NFS and Lustre keep for all machines unless they are mounted without; there, nothing is held.

    Raises:
        Occupied: another process of this machine holds it, or one of another machine did not let go of it.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._taken():
            host, _, process = os.pread(self._handle, 1000, 0).decode(errors="replace").strip().partition(" ")
            if host in ("", socket.gethostname()) or time.monotonic() > deadline:
                self.release()
                holder = f"process {process} on {host}" if process else "another process"
                raise Occupied(
                    f"{run_dir}: {holder} trains in this folder. Wait for it, or set run.dir to another one."
                )
            time.sleep(_POLL_SECONDS)

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(self._handle, 0)
            os.pwrite(self._handle, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a file system without locks, or one that is full
        return True

    def release(self) -> None:
        """Let go before this process ends."""
        os.close(self._handle)
