"""Weights & Biases, for those who have it: ``pip install wandb``."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moh_megatron.monitor.writer import Scalar


class WeightsAndBiases:
    """A run of ``project``; a resumed training goes on in the same one. It has the environment's WANDB_ settings."""

    def __init__(self, project: str, run_dir: Path) -> None:
        self._wandb = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=project,
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            dir=str(run_dir),
            resume="allow",
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def text(self, tag: str, text: str, step: int) -> None:
        table = self._wandb.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({tag: table}, step=step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({tag: self._wandb.Image(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)}, step=step)

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        self._run.log({tag: self._wandb.Histogram(list(values))}, step=step)

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        self._run.config.update(dict(settings), allow_val_change=True)
        self._run.summary.update(dict(results))

    def flush(self) -> None:
        """Nothing: it sends by itself."""

    def close(self) -> None:
        self._run.finish()
