"""A small prepared dataset and runs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import Run, prepare_small


@pytest.fixture(scope="module")
def process_groups() -> Iterator[None]:
    """Destroy the process groups of the module at its end, so that the next one can create its own."""
    yield
    import torch.distributed as dist
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return (configuration, prepared dataset)."""
    return prepare_small(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def new_run(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Run]:
    """Return a function that makes a run with a new folder."""
    config, data = prepared
    return lambda: Run(config, data, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def uninterrupted(new_run: Callable[[], Run]) -> Run:
    """Return a finished run that was never interrupted."""
    run = new_run()
    done = run.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    return run
