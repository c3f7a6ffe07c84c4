"""What docs/monitoring.md says a run shows is what it shows."""

from __future__ import annotations

import re

from support.runs import REPOSITORY, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COUNTS = ("dense_equivalent", "active_heads", "executed")
OF_OTHER_RUNS = {"validation/NAME", "evaluation/TASK", "alarms"}
"""Of several sources, of a suite, and of what went wrong."""


def documented() -> set[str]:
    """Tags of the table: `group/` `name`, ..., or whole."""
    text = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    found: set[str] = set()
    for cell in re.findall(r"^\| (.*?`.*?) \|", text.split("## Alarms")[0], re.MULTILINE):
        words = re.findall(r"`([^`]+)`", cell)
        groups = [word for word in words if word.endswith("/")] or [""]
        found |= {group + word for group in groups for word in words if not word.endswith("/")}
    return {tag.replace("COUNT", count) for tag in found for count in COUNTS}


def test_a_run_shows_what_is_documented_and_nothing_else(uninterrupted: Run) -> None:
    events = EventAccumulator(str(uninterrupted.folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    shown = [tag for kind in ("scalars", "images", "histograms", "tensors") for tag in tags[kind]]
    names = {tag.removesuffix("/text_summary") for tag in shown}
    names = {re.sub(r"head_\d\d$", "head_HH", re.sub(r"layer_\d\d\b", "layer_LL", name)) for name in names}
    hyperparameters = {name for name in names if name.startswith("_hparams_")}
    assert names - hyperparameters == documented() - OF_OTHER_RUNS
    assert "_hparams_/session_start_info" in events.summary_metadata or hyperparameters
