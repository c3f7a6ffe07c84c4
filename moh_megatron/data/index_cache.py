"""Builds index caches once: on rank 0, and on one rank of each node that does not share its file system."""

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
class IndexCache:
    """A folder of index files that ``make`` writes."""

    folder: Path
    make: Callable[[Path], object]

    @property
    def complete(self) -> bool:
        return (self.folder / "complete").exists()


def build_once(caches: Sequence[IndexCache]) -> None:
    """Build the caches that are not complete. Every rank calls this, and afterwards all caches are complete.

    Rank 0 builds first, then the first rank of each node that does not see what rank 0 built. An incomplete cache is
    built again; runs that share a dataset wait for each other.

    Raises Fault on every rank if a cache cannot be written.
    """
    if not distributed.is_initialized():
        _build(caches)
        return
    _run_on_all(lambda: _build(caches) if distributed.get_rank() == 0 else None)
    builds = _is_first_without(all(cache.complete for cache in caches))
    _run_on_all(lambda: _build_in_child(caches) if builds else None)


def _is_first_without(complete: bool) -> bool:
    """Whether this rank is the first of its node that lacks a cache."""
    states: list[tuple[str, bool]] = [("", True)] * distributed.get_world_size()
    distributed.all_gather_object(states, (socket.gethostname(), complete))
    ranks = [rank for rank, (host, has_all) in enumerate(states) if host == socket.gethostname() and not has_all]
    return bool(ranks) and ranks[0] == distributed.get_rank()


def _run_on_all(action: Callable[[], object]) -> None:
    """Run ``action``, wait for all ranks, and raise on all of them the Fault that one raised."""
    problem = None
    try:
        action()
    except Fault as error:
        problem = str(error)
    problems: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    for message in problems:
        if message is not None:
            raise Fault(message)


def _build_in_child(caches: Sequence[IndexCache]) -> None:
    """Build in a child process without torch.distributed: with it Megatron-core builds on rank 0 only."""
    process = multiprocessing.get_context("spawn").Process(target=_build, args=(caches,))
    process.start()
    process.join()
    if process.exitcode or not all(cache.complete for cache in caches):
        raise Fault(
            f"Cannot build the index cache {caches[0].folder.parent} on {socket.gethostname()}; its own message stands "
            "above. Make the folder writable there."
        )


def _build(caches: Sequence[IndexCache]) -> None:
    for cache in caches:
        if cache.complete:  # its folder may be read-only
            continue
        try:
            cache.folder.parent.mkdir(parents=True, exist_ok=True)
            with open(cache.folder.parent / "lock", "w") as lock:
                with suppress(OSError):  # on a file system without locks, runs that start at once may collide
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
