"""Where figures go: one small interface, and what keeps a writer that fails from stopping the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

Scalar = float | int | str | bool


class Writer(Protocol):
    """TensorBoard, Weights & Biases, a file for Prometheus. Tags have the form group/name."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One number for each tag."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Markdown."""
        ...

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [height, width, 1 or 3]."""
        ...

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """How ``values`` are spread."""
        ...

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """What a run was, beside what came of it."""
        ...

    def flush(self) -> None:
        """Show what was written."""
        ...

    def close(self) -> None:
        """Nothing more is written."""
        ...


class Writers:
    """Several writers as one. A writer that raises is named in one warning and left out from then on.

    Args:
        makers: of each writer, by what a warning calls it.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        self._open: dict[str, Writer] = {}
        for name, make in makers.items():
            try:
                self._open[name] = make()
            except Exception as error:
                self._give_up(name, error)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda writer: writer.scalars(values, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self._each(lambda writer: writer.text(tag, text, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._each(lambda writer: writer.image(tag, pixels, step))

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        self._each(lambda writer: writer.histogram(tag, values, step))

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        self._each(lambda writer: writer.hyperparameters(settings, results))

    def flush(self) -> None:
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        self._each(lambda writer: writer.close())
        self._open.clear()

    def _each(self, write: Callable[[Writer], None]) -> None:
        for name, writer in list(self._open.items()):
            try:
                write(writer)
            except Exception as error:  # of any library: nothing that only shows a run may end it
                del self._open[name]
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        logger.warning(f"{name}: {error or type(error).__name__}. Training goes on without it.")
