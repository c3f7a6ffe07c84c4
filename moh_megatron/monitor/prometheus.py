"""Writes the newest scalars in Prometheus' text format, for the node exporter's textfile collector."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from moh_megatron.monitor.writer import Scalar


class PrometheusFile:
    """Replaces the file ``path`` atomically at each ``flush``; it holds scalars only.

    Args:
        run: the value of each metric's label of that name.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in {**values, "step": step}.items():
            name = "moh_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag, ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)

    def flush(self) -> None:
        write_to_textfile(str(self._path), self._registry)

    def text(self, tag: str, text: str, step: int) -> None:
        """Nothing."""

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Nothing."""

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Nothing."""

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """The last values stay in the file."""
        self.flush()
