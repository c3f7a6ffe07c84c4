"""Evaluates checkpoints on tasks in another process, while the training goes on."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moh_megatron.checkpoint.layout import checkpoint_name
from moh_megatron.checkpoint.manifest import MANIFEST
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.results import RESULTS

logger = logging.getLogger(__name__)

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOG = "log.txt"
EVALUATE = ("-P", "-m", "moh_megatron.commands.evaluate")
"""Arguments with which Python runs moh-evaluate. -P: nothing is imported from the current folder."""


class BackgroundEvaluation:
    """Evaluates one checkpoint at a time, the newest one that was requested; for the first rank.

    Args:
        show: takes the score of each task, and the step.
        program: arguments of Python that run moh-evaluate.
    """

    def __init__(
        self,
        config: Config,
        show: Callable[[dict[str, float], int], None],
        program: Sequence[str] = EVALUATE,
    ) -> None:
        self._config, self._show, self._program = config, show, program
        self._waiting: int | None = None
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None

    @property
    def in_use(self) -> frozenset[int]:
        """Steps whose checkpoints are being read, or are going to be."""
        running = None if self._running is None else self._running[0]
        return frozenset(step for step in (running, self._waiting) if step is not None)

    def request(self, step: int) -> None:
        """Ask for an evaluation of the checkpoint of ``step``, which starts once it is complete."""
        self._waiting = step

    def advance(self) -> None:
        """Show the evaluation that is finished and start the one that was requested; waits for neither."""
        if self._running is not None and self._running[1].poll() is not None:
            self._finished(*self._running)
            self._running = None
        if self._waiting is None:
            return
        checkpoint = checkpoint_dir(self._config) / checkpoint_name(self._waiting)
        if not (checkpoint / MANIFEST).is_file():
            return
        step, self._waiting = self._waiting, None
        if self._running is not None:
            logger.info(f"evaluation of step {step} is left out: that of step {self._running[0]} still runs")
            return
        try:
            self._running = step, self._start(checkpoint, step)
        except OSError as error:
            logger.warning(f"evaluation of step {step} cannot be started: {error}. Training goes on without it.")

    def finish(self, seconds: float) -> None:
        """Wait for the running evaluation for so many seconds at most, then end it."""
        deadline = time.monotonic() + seconds
        self.advance()
        while self._running is not None and time.monotonic() < deadline:
            time.sleep(0.2)
            self.advance()
        self.stop()

    def stop(self) -> None:
        """End the running evaluation."""
        if self._running is not None:
            step, process = self._running
            process.terminate()
            process.wait()
            self._running = None
            logger.info(f"evaluation of step {step} was ended before it was finished")

    def _folder(self, step: int) -> Path:
        return Path(self._config.run.dir) / "eval" / checkpoint_name(step)

    def _start(self, checkpoint: Path, step: int) -> subprocess.Popen[bytes]:
        evaluate, folder = self._config.evaluate, self._folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        command = ["nice", "-n", "10", sys.executable, *self._program, str(checkpoint), "--no-validation"]
        command += ["--suite", str(evaluate.suite), "--device", evaluate.device, "--out", str(folder)]
        if evaluate.limit is not None:
            command += ["--limit", str(evaluate.limit)]
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        if evaluate.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (folder / _LOG).open("wb") as log:
            # It gets a session of its own: signals that stop the ranks are not meant for it.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _finished(self, step: int, process: subprocess.Popen[bytes]) -> None:
        folder = self._folder(step)
        try:
            suite = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["suite"]
        except (OSError, ValueError, KeyError):
            suite = {"tasks": []}
        scores = {task["task"]: task["value"] for task in suite["tasks"] if "value" in task}
        if scores and process.returncode != 2:  # 2: it was refused, and an earlier evaluation wrote the results.
            self._show(scores, step)
            listed = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
            logger.info(f"evaluation of step {step}: {listed}")
        if process.returncode != 0:
            logger.warning(
                f"evaluation of step {step} ended with code {process.returncode}; see {folder / _LOG}. "
                "Training goes on."
            )
