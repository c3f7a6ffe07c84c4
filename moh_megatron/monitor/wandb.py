"""Writes to Weights & Biases, where it is installed: ``pip install wandb``."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moh_megatron.io.errors import UserError
from moh_megatron.monitor.writer import Scalar


class WeightsAndBiases:
    """Writes to a run of ``project``, the same one after a restart. W&B reads WANDB_ settings of the environment."""

    def __init__(self, project: str, run_dir: Path) -> None:
        try:
            self._wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            raise UserError(f"monitor.wandb_project needs the package {error.name}: pip install {error.name}") from None
        self._run = self._wandb.init(
            project=project,
            name=run_dir.resolve().name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            dir=str(run_dir),
            resume="allow",
        )
        # W&B drops figures of a step below its newest one, such as those of an evaluation. Therefore the step is logged
        # as a figure of its own.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    def text(self, tag: str, text: str, step: int) -> None:
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._log({tag: table}, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._log({tag: self._wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)}, step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        self._log({tag: self._wandb.Histogram(list(values))}, step)

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.summary.update(dict(results))

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._run.log({**values, "step": step})

    def flush(self) -> None:
        """Nothing: W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()
