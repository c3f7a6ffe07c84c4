"""The newest scalars in Prometheus' text format, for the node exporter's textfile collector."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moh_megatron.monitor.writer import Scalar


class PrometheusFile:
    """``path`` is replaced whole at each ``flush``; what is no scalar has no place in it."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self._values: dict[str, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._values.update(values)
        self._values["step"] = step

    def flush(self) -> None:
        """Replace the file."""
        lines = []
        for tag, value in sorted(self._values.items()):
            name = "moh_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag)
            lines += [f"# TYPE {name} gauge", f'{name}{{run="{self._label}"}} {_shown(value)}']
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, self._path)

    def text(self, tag: str, text: str, step: int) -> None:
        """Nothing."""

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Nothing."""

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Nothing."""

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """The last values stay."""
        self.flush()


def _shown(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(float(value)) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")
