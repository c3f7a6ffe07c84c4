"""When checkpoints are written: behind the training's back, one at a time, and by every rank or not at all."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Container
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from moh_megatron.checkpoint import save
from moh_megatron.checkpoint.layout import complete_checkpoints
from moh_megatron.checkpoint.save import Snapshot
from moh_megatron.io.errors import Fault
from moh_megatron.io.remedies import remedy

_DONE, _BUSY, _FAILED = range(3)
_PATIENCE_SECONDS = 1.0
_ZIP_WRITERS = ("PytorchStreamWriter", "inline_container")


@dataclass
class _InFlight:
    """A save that is not complete: every rank writes its part, then the first one publishes the whole."""

    snapshot: Snapshot
    in_use: Container[int]
    job: Future[Any]
    publishing: bool = False


class Saver:
    """Writes the checkpoints of one run. Every rank has one and calls it at the same places.

    A snapshot is handed over with ``begin``; ``advance``, called after each step, lets the ranks agree on what has been
    done; ``finish`` waits. All communication is in these three, in the caller's thread.

    Args:
        root: the folder of checkpoints.
        group: all ranks, able to exchange host memory.

    All three raise Fault, on every rank alike, where a rank could not write; complete checkpoints are untouched.
    """

    def __init__(self, root: Path, group: dist.ProcessGroup) -> None:
        self._root, self._group = root, group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._now: _InFlight | None = None

    def begin(self, snapshot: Snapshot, in_use: Container[int] = frozenset()) -> None:
        """Start to write ``snapshot``; first waits for the save before it.

        The first rank's ``in_use``: steps whose checkpoints retention leaves alone this time.
        """
        self.finish()
        self._make_room(snapshot)
        self._now = _InFlight(snapshot, in_use, self._thread.submit(save.write_part, self._root, snapshot))

    def finish(self) -> None:
        """Wait until nothing is in flight."""
        while self._now is not None:
            # A rank that is done meets the others now and then: nobody is missed in a collective for long.
            wait([self._now.job], timeout=_PATIENCE_SECONDS)
            self.advance()

    def advance(self) -> None:
        """Go on with the save in flight as far as all ranks are; does not wait."""
        now = self._now
        if now is None:
            return
        state = torch.tensor(_state(now.job), dtype=torch.int32)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        if state == _FAILED:
            self._now = None
            self._raise_together(now)
        elif state == _DONE and now.publishing:
            self._now = None
        elif state == _DONE:
            files = [entry for part in self._gather(now.job.result()) for entry in part.items()]
            now.publishing = True
            if dist.get_rank() == 0:
                now.job = self._thread.submit(
                    save.publish, self._root, now.snapshot, dict(files), self._group.size(), now.in_use
                )

    def _make_room(self, snapshot: Snapshot) -> None:
        """Prepare the folder; ends on every rank alike before anything is written where the disk cannot hold it."""
        needed = sum(self._gather(snapshot.nbytes))
        verdict: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._root.mkdir(exist_ok=True)  # not its parents: a run folder that was deleted is not made anew
                save.make_room(self._root, snapshot.step)
                free = shutil.disk_usage(self._root).free
                if free < needed:
                    have = f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free."
                    verdict[0] = self._cannot_write(snapshot.step, f"No space left on device ({have})", errno.ENOSPC)
            except OSError as error:
                verdict[0] = self._cannot_write(snapshot.step, f"{error}.", error.errno)
        dist.broadcast_object_list(verdict, src=0, group=self._group)
        if verdict[0] is not None:
            raise Fault(verdict[0])

    def _raise_together(self, now: _InFlight) -> None:
        # The partial folder stays until the next save: another rank may still be writing into it.
        error = now.job.exception() if now.job.done() else None
        refused = None if error is None else _refused(error)
        failures = self._gather(None if error is None else (refused, f"{type(error).__name__}: {error}"))
        if error is not None and refused is None:
            raise error
        rank, (reason, told) = next((rank, failure) for rank, failure in enumerate(failures) if failure is not None)
        if reason is None:
            raise Fault(f"rank {rank} could not write the checkpoint of step {now.snapshot.step}: {told}")
        raise Fault(self._cannot_write(now.snapshot.step, *reason)) from error

    def _gather(self, own: Any) -> list[Any]:
        parts: list[Any] = [None] * self._group.size()
        dist.all_gather_object(parts, own, group=self._group)
        return parts

    def _cannot_write(self, step: int, reason: str, number: int | None) -> str:
        newest = next((path.name for path, _ in complete_checkpoints(self._root, up_to=step - 1)), "none")
        hint = remedy(number) or "set run.dir to another disk"
        return (
            f"the checkpoint of step {step} cannot be written to {self._root}: {reason.strip()} "
            f"{hint[0].upper()}{hint[1:]}. Newest complete checkpoint: {newest}."
        )


def _state(job: Future[Any]) -> int:
    if not job.done():
        return _BUSY
    return _DONE if job.exception() is None else _FAILED


def _refused(error: BaseException) -> tuple[str, int | None] | None:
    """What the file system refused and its number of the error, or None if ``error`` is something else."""
    if isinstance(error, OSError):
        return f"{error}.", error.errno
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return f"{error}.", int(number[1]) if number else None
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _ZIP_WRITERS):
        reason = "a file could not be written whole; the disk, a quota or a limit on file sizes is exhausted."
        return reason, errno.ENOSPC
    return None
