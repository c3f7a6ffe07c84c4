"""Writes event files for TensorBoard."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from moh_megatron.monitor.event_files import move_earlier_event_files
from moh_megatron.monitor.records import naming
from moh_megatron.monitor.writer import Scalar

_CHARTS = {
    "loss": {
        "language model": ("loss/lm", "loss/total"),
        "validation": ("loss/validation", "validation/.*"),
        "balance and z": ("loss/balance", "loss/z"),
    },
    "throughput": {
        "tokens a second": ("throughput/tokens_per_second",),
        "MFU": ("throughput/mfu_.*",),
        "seconds of a step": ("time/(data|forward|backward|optimizer|save|step)",),
    },
    "routing": {
        "dead heads": ("routing_dead_heads/.*",),
        "entropy of the load": ("routing_load_entropy/.*",),
        "entropy of a token's choice": ("routing_entropy/.*",),
    },
    "optimizer": {"learning rate": ("optimizer/lr",), "norms": ("optimizer/.*_norm",)},
}
_LAYOUT = {
    category: {title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in charts.items()}
    for category, charts in _CHARTS.items()
}
"""The page CUSTOM SCALARS, in this order. The other pages sort tags by name: `loss` comes first by that, too."""


class TensorBoard:
    """Writes a run's event files into its folder; the steps of a resumed run replace those after ``start_step`` from
    before."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder, self._step = str(folder), start_step
        self._previous_hook, threading.excepthook = threading.excepthook, self._thread_hook
        try:
            with naming(self._folder):
                move_earlier_event_files(folder)
                self._writer = SummaryWriter(self._folder, purge_step=start_step + 1)
                self._writer.add_custom_scalars(_LAYOUT)
        except BaseException:
            self._restore_hook()
            raise

    def _thread_hook(self, args: threading.ExceptHookArgs) -> None:
        """Ignore OSErrors of TensorBoard's writing thread: the next call raises them again."""
        is_writer = type(args.thread).__module__.partition(".")[0] == "tensorboard"
        if not (is_writer and issubclass(args.exc_type, OSError)):
            self._previous_hook(args)

    def _restore_hook(self) -> None:
        if threading.excepthook == self._thread_hook:
            threading.excepthook = self._previous_hook

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._step = max(self._step, step)
        with naming(self._folder):
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        with naming(self._folder):
            self._writer.add_text(tag, text, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        with naming(self._folder):
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def histogram(self, tag: str, values: Sequence[float], step: int) -> None:
        with naming(self._folder):
            self._writer.add_histogram(tag, np.asarray(values), step)

    def hyperparameters(self, settings: Mapping[str, Scalar], results: Mapping[str, float]) -> None:
        with naming(self._folder):
            # add_hparams would write to another folder, which TensorBoard would show as another run.
            file_writer = self._writer._get_file_writer()
            for summary in hparams(dict(settings), dict(results)):
                file_writer.add_summary(summary)
            for tag, value in results.items():
                self._writer.add_scalar(tag, value, self._step)

    def flush(self) -> None:
        with naming(self._folder):
            self._writer.flush()

    def close(self) -> None:
        try:
            with naming(self._folder):
                self._writer.close()
        finally:
            self._restore_hook()
