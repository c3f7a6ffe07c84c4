"""A torch profiler trace of a few steps, for TensorBoard's profiler plugin or chrome://tracing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

logger = logging.getLogger(__name__)

_SKIPPED, _WARMING, _RECORDED = 2, 1, 3
"""Steps: the first ones allocate and compile, one more starts the profiler itself."""


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[Callable[[], None]]:
    """What is yielded is called after each step; the trace appears in ``folder`` (None: no profiling). A
    folder that cannot be written is a warning."""
    if folder is None:
        yield lambda: None
        return
    write = tensorboard_trace_handler(str(folder), worker_name="rank0")

    def ready(profiler: profile) -> None:
        try:
            write(profiler)
        except Exception as error:  # of any library: nothing that only shows a run may end it
            logger.warning(f"profile: {error}. Training goes on without it.")
            return
        logger.info(f"profile of {_RECORDED} steps: {folder}; see it with: tensorboard --logdir {folder}")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    steps = schedule(wait=_SKIPPED, warmup=_WARMING, active=_RECORDED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=ready) as profiler:
        yield profiler.step
