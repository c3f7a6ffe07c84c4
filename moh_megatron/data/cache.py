"""Index caches: built once by one rank, or by one rank of each node where nodes do not share the file system."""

from __future__ import annotations

import fcntl
import multiprocessing
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from moh_megatron.io.errors import Fault


@dataclass(frozen=True)
class Cache:
    folder: Path
    make: Callable[[Path], object]
    """Fills the folder."""

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").exists()


def build_once(caches: Sequence[Cache]) -> None:
    """Make those that are not complete; every rank calls this and finds all of them complete afterwards.

    Rank 0 builds. Then, on each node that does not see what it built, the first rank does. A cache that was half built
    is built anew; runs that share a dataset wait for each other.

    Raises Fault, on every rank, where a cache cannot be written.
    """
    if not distributed.is_initialized():
        _attempt(caches)
        return
    _together(lambda: _attempt(caches) if distributed.get_rank() == 0 else None)
    mine = _first_that_sees_none(all(cache.complete for cache in caches))
    _together(lambda: _in_another_process(caches) if mine else None)


def _first_that_sees_none(seen: bool) -> bool:
    """Whether this rank is the first of its node that lacks a cache."""
    views: list[tuple[str, bool]] = [("", True)] * distributed.get_world_size()
    distributed.all_gather_object(views, (socket.gethostname(), seen))
    lacking = [rank for rank, (host, sees) in enumerate(views) if host == socket.gethostname() and not sees]
    return bool(lacking) and lacking[0] == distributed.get_rank()


def _together(work: Callable[[], object]) -> None:
    """Do it, wait for all ranks, and raise on all what one met."""
    problem = None
    try:
        work()
    except Fault as error:
        problem = str(error)
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    if found := [each for each in problems if each is not None]:
        raise Fault(found[0])


def _in_another_process(caches: Sequence[Cache]) -> None:
    """Megatron-core builds only on rank 0 or outside of torch.distributed, so it is led outside."""
    process = multiprocessing.get_context("spawn").Process(target=_attempt, args=(caches,))
    process.start()
    process.join()
    if process.exitcode or not all(cache.complete for cache in caches):
        raise Fault(
            f"Cannot build the index cache {caches[0].folder.parent} on {socket.gethostname()}; its own message stands "
            "above. Make the folder writable there."
        )


def _attempt(caches: Sequence[Cache]) -> None:
    missing = [cache for cache in caches if not cache.complete]  # none: the folders may be read-only
    for cache in missing:
        try:
            cache.folder.parent.mkdir(parents=True, exist_ok=True)
            with open(cache.folder.parent / "lock", "w") as lock:
                with suppress(OSError):  # a file system without locks: two runs that start at once may meet
                    fcntl.flock(lock, fcntl.LOCK_EX)
                if not cache.complete:
                    shutil.rmtree(cache.folder, ignore_errors=True)
                    cache.folder.mkdir()
                    cache.make(cache.folder)
                    (cache.folder / "complete").touch()
        except OSError as error:
            raise Fault(
                f"Cannot write the index cache {cache.folder}: {error.strerror or error}. Make the folder writable "
                "once, or copy the dataset and set data.dir."
            ) from error
