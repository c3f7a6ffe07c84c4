"""A run shows the tags that docs/monitoring.md documents."""

from __future__ import annotations

import re

from support.runs import REPOSITORY, Run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

COUNTS = ("dense_equivalent", "active_heads", "executed")
OPTIONAL_TAGS = {"head_load/layer_LL/head_HH", "validation/NAME", "tasks/TASK", "alarms"}
"""Tags of several sources, of a suite, of alarms and of single heads, which this run need not show."""


def documented() -> set[str]:
    """The tags of the table, written as `group/` `name`, ..., or complete."""
    text = (REPOSITORY / "docs" / "monitoring.md").read_text(encoding="utf-8")
    found: set[str] = set()
    for cell in re.findall(r"^\| (.*?`.*?) \|", text.split("## Alarms")[0], re.MULTILINE):
        words = re.findall(r"`([^`]+)`", cell)
        groups = [word for word in words if word.endswith("/")] or [""]
        found |= {group + word for group in groups for word in words if not word.endswith("/")}
    return {tag.replace("COUNT", count) for tag in found for count in COUNTS}


def test_a_run_shows_exactly_the_documented_tags(uninterrupted: Run) -> None:
    events = EventAccumulator(str(uninterrupted.folder))
    events.Reload()
    tags = events.Tags()
    shown = [tag for kind in ("scalars", "images", "histograms", "tensors") for tag in tags[kind]]
    names = {tag.removesuffix("/text_summary") for tag in shown}
    names = {re.sub(r"head_\d\d$", "head_HH", re.sub(r"layer_\d\d\b", "layer_LL", name)) for name in names}
    assert names <= documented()
    assert documented() - names <= OPTIONAL_TAGS
    written = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = metadata.parse_session_start_info_plugin_data(written).hparams
    assert settings["moh.active_heads"].number_value == 4
    assert settings["train.init_from"].string_value == "null"
    assert settings["generate.prompts"].string_value == '["the"]'
