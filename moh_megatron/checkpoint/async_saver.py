"""Writes checkpoints in a background thread, one at a time, and completes one only when every rank has written."""

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
    """A save that is not complete: every rank writes its part, then the first rank commits the checkpoint."""

    snapshot: Snapshot
    in_use: Container[int]
    job: Future[Any]
    committing: bool = False


class AsyncSaver:
    """Writes the checkpoints of one run. Every rank has one and makes the same calls in the same order.

    ``begin`` starts to write a snapshot; ``advance``, called after each step, lets the ranks agree on what has been
    done; ``finish`` waits. Only these three communicate, in the caller's thread. All of them raise Fault, on every
    rank, where a rank could not write; complete checkpoints are not changed then.

    Args:
        root: the folder of checkpoints.
        group: all ranks, able to exchange host memory.
    """

    def __init__(self, root: Path, group: dist.ProcessGroup) -> None:
        self._root, self._group = root, group
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._now: _InFlight | None = None

    def begin(self, snapshot: Snapshot, in_use: Container[int] = frozenset()) -> None:
        """Start to write ``snapshot``; first waits for the save before it.

        Args:
            in_use: steps whose checkpoints retention must not delete this time; counts on the first rank.
        """
        self.finish()
        self._make_room(snapshot)
        self._now = _InFlight(snapshot, in_use, self._thread.submit(save.write_part, self._root, snapshot))

    def finish(self) -> None:
        """Wait until no save is in flight."""
        while self._now is not None:
            # A rank that is done joins the others' collective now and then, so that none waits there for long.
            wait([self._now.job], timeout=_PATIENCE_SECONDS)
            self.advance()

    def advance(self) -> None:
        """Take the next step of the save in flight if all ranks are ready for it; does not wait."""
        now = self._now
        if now is None:
            return
        state = torch.tensor(_state(now.job), dtype=torch.int32)
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=self._group)
        if state == _FAILED:
            self._now = None
            self._raise_together(now)
        elif state == _DONE and now.committing:
            self._now = None
        elif state == _DONE:
            files = [entry for part in self._all_gather(now.job.result()) for entry in part.items()]
            now.committing = True
            if dist.get_rank() == 0:
                now.job = self._thread.submit(
                    save.commit, self._root, now.snapshot, dict(files), self._group.size(), now.in_use
                )

    def _make_room(self, snapshot: Snapshot) -> None:
        """Prepare the folder; raises Fault on every rank, before anything is written, where the disk is too small."""
        needed = sum(self._all_gather(snapshot.nbytes))
        failure: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                self._root.mkdir(exist_ok=True)  # Not its parents: a deleted run folder must stay deleted.
                save.make_room(self._root, snapshot.step)
                free = shutil.disk_usage(self._root).free
                if free < needed:
                    have = f"{needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free."
                    failure[0] = self._cannot_write(snapshot.step, f"No space left on device ({have})", errno.ENOSPC)
            except OSError as error:
                failure[0] = self._cannot_write(snapshot.step, f"{error}.", error.errno)
        dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise Fault(failure[0])

    def _raise_together(self, now: _InFlight) -> None:
        # The partial folder stays until the next save: another rank may still be writing into it.
        error = now.job.exception() if now.job.done() else None
        refusal = None if error is None else _refusal(error)
        failures = self._all_gather(None if error is None else (refusal, f"{type(error).__name__}: {error}"))
        if error is not None and refusal is None:
            raise error
        rank, (reported, description) = next(
            (rank, failure) for rank, failure in enumerate(failures) if failure is not None
        )
        if reported is None:
            raise Fault(f"rank {rank} could not write the checkpoint of step {now.snapshot.step}: {description}")
        raise Fault(self._cannot_write(now.snapshot.step, *reported)) from error

    def _all_gather(self, own: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._group.size()
        dist.all_gather_object(gathered, own, group=self._group)
        return gathered

    def _cannot_write(self, step: int, reason: str, number: int | None) -> str:
        newest = next((path.name for path, _ in complete_checkpoints(self._root, up_to=step - 1)), "none")
        hint = remedy(number, "run.dir") or "set run.dir to another disk"
        return (
            f"the checkpoint of step {step} cannot be written to {self._root}: {reason.strip()} "
            f"{hint[0].upper()}{hint[1:]}. Newest complete checkpoint: {newest}."
        )


def _state(job: Future[Any]) -> int:
    if not job.done():
        return _BUSY
    return _DONE if job.exception() is None else _FAILED


def _refusal(error: BaseException) -> tuple[str, int | None] | None:
    """What the file system refused and the number of its error, or None if ``error`` is of another kind."""
    if isinstance(error, OSError):
        return f"{error}.", error.errno
    if isinstance(error, SafetensorError):
        number = re.search(r"os error (\d+)", str(error))
        return f"{error}.", int(number[1]) if number else None
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _ZIP_WRITERS):
        reason = "a file could not be written completely; the disk, a quota or a limit on file sizes is exhausted."
        return reason, errno.ENOSPC
    return None
