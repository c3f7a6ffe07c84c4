"""The interface of writers of figures, and a wrapper that keeps a failing writer from ending the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

logger = logging.getLogger(__name__)

Scalar = float | int | str | bool


class Writer(Protocol):
    """Writes figures: to TensorBoard, Weights & Biases or a file for Prometheus. Tags have the form group/name."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one number for each tag."""
        ...

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""
        ...

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Write an image, uint8 [height, width, 1 or 3]."""
        ...

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        """Write the distribution of ``values``."""
        ...

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        """Write the settings of a run together with its results."""
        ...

    def flush(self) -> None:
        """Make everything that was written visible."""
        ...

    def close(self) -> None:
        """Flush and close; nothing more is written."""
        ...


class Writers:
    """Several writers as one. A writer that raises is named in one warning and left out from then on.

    Args:
        makers: functions that make the writers, by the name that a warning uses.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Writer]]) -> None:
        self._open: dict[str, Writer] = {}
        for name, make in makers.items():
            try:
                self._open[name] = make()
            except Exception as error:
                self._give_up(name, error)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._call(lambda writer: writer.scalars(values, step))

    def text(self, tag: str, text: str, step: int) -> None:
        self._call(lambda writer: writer.text(tag, text, step))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        self._call(lambda writer: writer.image(tag, pixels, step))

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        self._call(lambda writer: writer.histogram(tag, values, step))

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        self._call(lambda writer: writer.hyperparameters(settings, results))

    def flush(self) -> None:
        self._call(lambda writer: writer.flush())

    def close(self) -> None:
        self._call(lambda writer: writer.close())
        self._open.clear()

    def _call(self, write: Callable[[Writer], None]) -> None:
        for name, writer in list(self._open.items()):
            try:
                write(writer)
            except Exception as error:  # Whatever the error is: a writer must not end a run.
                del self._open[name]
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        logger.warning(f"{name}: {error or type(error).__name__}. Training goes on without it.")
