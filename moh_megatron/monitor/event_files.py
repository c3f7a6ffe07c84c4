"""Where the event files of a run lie: in the run folder itself, because TensorBoard names a run after their folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PATTERN = "events.out.tfevents.*"
_EARLIER_FOLDER = "tensorboard"


def event_folder(run_dir: Path) -> Path:
    """The folder with the event files of a run: ``tensorboard/`` where only an earlier version wrote some."""
    earlier = run_dir / _EARLIER_FOLDER
    if any(earlier.glob(_PATTERN)) and not any(run_dir.glob(_PATTERN)):
        return earlier
    return run_dir


def move_earlier_event_files(run_dir: Path) -> None:
    """Move the event files that an earlier version wrote to ``tensorboard/`` into the run folder.

    TensorBoard replaces the figures of a step only within one folder; two folders would show a broken curve each.
    """
    earlier = run_dir / _EARLIER_FOLDER
    for file in sorted(earlier.glob(_PATTERN)):
        file.rename(run_dir / file.name)
    with suppress(OSError):  # It is not there, or holds something else.
        earlier.rmdir()
