"""Tasks while the training goes on: another process evaluates the checkpoint, this one looks now and then."""

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
"""What Python runs as moh-evaluate; -P: nothing is imported from the folder the user stands in."""


class BackgroundEvaluation:
    """One evaluation at a time, of the newest checkpoint that was due; for the first rank.

    Args:
        program: what Python runs, with the arguments of moh-evaluate.
        show: is given the scores of each task and the step.
    """

    def __init__(
        self,
        config: Config,
        program: Sequence[str],
        show: Callable[[dict[str, float], int], None],
    ) -> None:
        self._config, self._program, self._show = config, program, show
        self._waiting: int | None = None
        self._running: tuple[int, subprocess.Popen[bytes]] | None = None

    @property
    def in_use(self) -> frozenset[int]:
        """Steps whose checkpoints are read, or are going to be."""
        running = None if self._running is None else self._running[0]
        return frozenset(step for step in (running, self._waiting) if step is not None)

    def request(self, step: int) -> None:
        """Evaluate the checkpoint of ``step`` once it is complete."""
        self._waiting = step

    def advance(self) -> None:
        """Start what waits, show what is finished; does not wait for either."""
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
        """Wait for what runs, so long at most; what is not finished then is ended."""
        deadline = time.monotonic() + seconds
        self.advance()
        while self._running is not None and time.monotonic() < deadline:
            time.sleep(0.2)
            self.advance()
        self.stop()

    def stop(self) -> None:
        """End what runs."""
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
        command += [
            str(checkpoint),
            "--no-validation",
            "--suite",
            str(evaluate.suite),
            "--device",
            evaluate.device,
            "--out",
            str(folder),
        ]
        if evaluate.limit is not None:
            command += ["--limit", str(evaluate.limit)]
        environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        if evaluate.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (folder / _LOG).open("wb") as log:
            # A session of its own: what stops the ranks is not meant for it.
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _finished(self, step: int, process: subprocess.Popen[bytes]) -> None:
        folder = self._folder(step)
        try:
            suite = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["suite"]
        except (OSError, ValueError, KeyError):
            suite = {"tasks": []}
        scores = {each["task"]: each["value"] for each in suite["tasks"] if "value" in each}
        if scores and process.returncode != 2:  # refused, it has left what an earlier one wrote
            self._show(scores, step)
            logger.info(
                f"evaluation of step {step}: " + ", ".join(f"{name} {each:.3f}" for name, each in scores.items())
            )
        if process.returncode != 0:
            logger.warning(
                f"evaluation of step {step} ended with code {process.returncode}; see {folder / _LOG}. "
                "Training goes on."
            )
