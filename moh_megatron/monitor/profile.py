"""Writes a torch profiler trace of a few steps, for TensorBoard's profiler plugin or chrome://tracing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

logger = logging.getLogger(__name__)

_SKIPPED, _WARM_UP, _RECORDED = 2, 1, 3
"""Numbers of steps: the first ones allocate and compile, and in the next one the profiler itself starts."""


@contextlib.contextmanager
def profiled(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Profile the block; call the function that is yielded after each step.

    The trace is written to ``folder`` (None: no profiling). A folder that cannot be written is a warning.
    """
    if folder is None:
        yield lambda: None
        return
    write = tensorboard_trace_handler(str(folder), worker_name="rank0")

    def write_trace(profiler: profile) -> None:
        try:
            write(profiler)
        except Exception as error:  # Whatever the error is: a profile must not end a run.
            logger.warning(f"profile: {error}. Training goes on without it.")
            return
        logger.info(f"profile of {_RECORDED} steps: {folder}; see it with: tensorboard --logdir {folder}")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    steps = schedule(wait=_SKIPPED, warmup=_WARM_UP, active=_RECORDED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write_trace) as profiler:
        yield profiler.step
