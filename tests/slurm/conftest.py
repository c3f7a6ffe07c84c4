"""One cluster for the session, a small prepared dataset, and jobs on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs
from jobs import LONG, Job
from support.runs import Run, prepare_small


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if os.geteuid() != 0:
        pytest.fail("the tests of slurm/ start a Slurm of their own, which needs root: sudo make test-slurm")
    if missing := missing_programs():
        pytest.fail(f"missing: {', '.join(missing)}. Run make test-slurm, which installs them.")
    with Cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (configuration, prepared dataset)."""
    return prepare_small(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def new_job(cluster: Cluster, prepared: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[[], Job]]:
    """Return a function that makes training jobs with new run folders; end them after the test and repair all nodes."""
    jobs: list[Job] = []

    def make() -> Job:
        jobs.append(Job(cluster, Run(*prepared, tmp_path / f"run{len(jobs)}")))
        return jobs[-1]

    yield make
    for job in jobs:
        job.end()
    for node in set(cluster.nodes) - set(cluster.machines):
        cluster.boot(node)
    cluster.wait_until_idle()


def _without_slurm(prepared: tuple[Path, Path], folder: Path, ranks: int, *overrides: str) -> Run:
    run = Run(*prepared, folder / "run")
    done = run.finish(*overrides, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="session")
def undisturbed(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the long run on two ranks, TP 2, without Slurm and without a fault."""
    return _without_slurm(prepared, tmp_path_factory.mktemp("undisturbed"), 2, *LONG)


@pytest.fixture(scope="session")
def four_ranks(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the short run at TP 2 x DP 2, without Slurm."""
    return _without_slurm(prepared, tmp_path_factory.mktemp("four_ranks"), 4)
